"""PEFT's rank and alpha patterns: regular expressions that come from strangers, so their cost is bounded before use.

Python's `re` backtracks and cannot be stopped; one evil pattern would hang the gateway. The bound is coarse and on the
safe side: it refuses nested repetition outright, and otherwise counts how many ways the pattern could be tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from slipstream.adapters.rejection import Rule, reject, show

MAX_PATTERNS = 2048
MAX_PATTERN_CHARS = 512
MAX_COST = 20_000  # ways to try, over all patterns of one folder; a path is about 64 characters
_PATH_CHARS = 64

V = TypeVar("V")
Patterns = tuple[tuple[re.Pattern[str], V], ...]


def compile_patterns(table: Mapping[str, V], field: str, file: str) -> Patterns[V]:
    """Compile PEFT's `{pattern: value}`, order kept. Raises `AdapterRejected` for invalid or costly patterns."""
    _check_cost(table, field, file)
    return tuple((_compile(rf"(.*\.)?({key})$", key, field, file), value) for key, value in table.items())


def compile_whole(pattern: str, field: str, file: str) -> re.Pattern[str]:
    """Compile a pattern for whole paths, as PEFT's `target_modules` has it. Raises `AdapterRejected` like the above."""
    _check_cost([pattern], field, file)
    return _compile(pattern, pattern, field, file)


def first_match(patterns: Patterns[V], path: str, default: V) -> V:
    """The value of the first pattern that matches `path`, as PEFT 0.21's `get_pattern_key` picks it."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def is_ambiguous(patterns: Patterns[V], path: str) -> bool:
    """Whether patterns with different values match `path`, so that their order decides."""
    return len({value for pattern, value in patterns if pattern.match(path)}) > 1


def _compile(pattern: str, key: str, field: str, file: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        reject(Rule.UNSAFE_PATTERN, f"{file}: the {field} pattern {show(key)} is not a valid regular expression.", file)


def _check_cost(keys: Iterable[str], field: str, file: str) -> None:
    total = 0
    for count, key in enumerate(keys, start=1):
        cost = _cost(key)
        total += MAX_COST + 1 if cost is None else cost
        if total > MAX_COST or count > MAX_PATTERNS:
            advice = "Write the module paths out, or use one plain `.*` and no nested repetition"
            reject(
                Rule.UNSAFE_PATTERN, f"{file}: the {field} pattern {show(key)} is too costly to match. {advice}.", file
            )


def _cost(key: str) -> int | None:
    """An upper bound of the ways to try `key` on one path, or None where no bound is known."""
    if len(key) > MAX_PATTERN_CHARS or re.search(r"\\[1-9]", key):  # back-references
        return None
    if re.search(r"\[\^?\[|--|&&|~~|\|\|", key):  # Python warns that it may read these as set operations one day
        return None
    plain = re.sub(r"\\.", "x", key).replace("(?:", "(")
    if "(?" in plain or re.search(r"\)[*+{]", plain):  # look-around, flags; a repeated group
        return None
    repeats = len(re.findall(r"[*+?{]\??", plain))
    tries: int = _PATH_CHARS**repeats * (plain.count("|") + 1) ** max(plain.count("("), 1)
    return tries
