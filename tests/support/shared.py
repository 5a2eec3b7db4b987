"""The material beside the checkout (trained adapters, data sets, schemas), where there is any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_path(*parts: str) -> Path:
    """`<repository>/../shared/<parts>`. Absent: skip the test, or fail it under SLIPSTREAM_REQUIRE_SHARED=1."""
    path = Path(__file__).resolve().parents[3].joinpath("shared", *parts)
    if not path.exists():
        reason = f"shared/{'/'.join(parts)} is not beside this checkout"
        if os.environ.get("SLIPSTREAM_REQUIRE_SHARED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
