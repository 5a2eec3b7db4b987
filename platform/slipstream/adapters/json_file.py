"""Reading a publisher's JSON: small, UTF-8, one object, no key twice. Never raises anything but `AdapterRejected`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NoReturn

from slipstream.adapters.rejection import Rule, reject, show

MAX_CONFIG_BYTES = 1 << 20


def read_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, object]:
    """The JSON object in `path`; `NaN` and `Infinity`, which Python's reader allows, are refused."""
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        reject(Rule.FILE_TOO_LARGE, f"{path.name} is over {max_bytes} bytes. Is it really a configuration?", path.name)
    return parse_object(raw, path.name, Rule.BAD_JSON)


def parse_object(raw: bytes, name: str, rule: Rule) -> dict[str, object]:
    """Parse strict JSON; `rule` is the code of a malformed text, `name` the file it stands in."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError:
        reject(rule, f"{name} is not UTF-8. Save it as UTF-8 JSON.", name)
    except _DuplicateKeyError as error:
        code = Rule.DUPLICATE_TENSOR if rule is Rule.BAD_HEADER else rule
        reject(code, f"{name} gives the key {show(error.key)} twice. Keep one of them.", name)
    except (ValueError, RecursionError):  # malformed, an integer of thousands of digits, or nested without end
        reject(rule, f"{name} is not valid JSON. Save the adapter again; a hand edit may have broken it.", name)
    if not isinstance(value, dict):
        reject(Rule.JSON_NOT_OBJECT if rule is Rule.BAD_JSON else rule, f"{name} must hold one JSON object.", name)
    return value


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKeyError(key)
        result[key] = value
    return result


def _constant(text: str) -> NoReturn:
    raise ValueError(text)
