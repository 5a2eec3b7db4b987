"""The ways people write a version."""

from __future__ import annotations

import re


def to_reference(text: str) -> str:
    """`sql/3` (as other SDKs write it) is `sql@3`; everything else stays as it is."""
    match = re.fullmatch(r"([^/@]+)/([1-9][0-9]*)", text)
    return f"{match[1]}@{match[2]}" if match else text
