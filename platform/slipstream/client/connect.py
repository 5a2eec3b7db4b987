"""What every client needs to reach a server: its address, its headers, its paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx

from slipstream.errors import InvalidRequest

TIMEOUT = httpx.Timeout(30.0, read=600.0, write=120.0)  # a large adapter is checked and stored before the answer comes


def checked_url(url: str) -> str:
    """A server's address as a base for paths, also when it was written as OpenAI's clients want it."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidRequest(f"{url!r} is not a URL of a server, such as http://127.0.0.1:8000.", param="url")
    return url.rstrip("/").removesuffix("/v1")  # as OpenAI's clients want it written


def visible(text: str, what: str) -> str:
    """Header values that httpx cannot send, or that would be cut or refused on the way."""
    if not re.fullmatch(r"[!-~]+", text):
        raise InvalidRequest(f"The {what} holds a character that it cannot have, such as a space. Copy it again.")
    return text


def path_part(text: str) -> str:
    """One path segment. Dots alone would be resolved away before the request leaves: `..` must stay a refused name."""
    quoted = quote(text, safe="", errors="replace")  # bytes of the command line that are no text: a refused name too
    return quoted.replace(".", "%2E") if set(text) <= {"."} else quoted


def open_rows(path: Path) -> BinaryIO:
    """A file of training rows, to be sent. Raises `InvalidRequest` when there is none."""
    try:
        return path.open("rb")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read ({error.strerror}).", param="file") from error
