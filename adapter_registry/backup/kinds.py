"""Every kind of key that the registry has in Redis, and what a backup does with it. The one place where that is decided.

A backup refuses a registry that holds a key of no kind: nobody has decided yet whether it may be left out.
`tests/unit/test_key_kinds.py` asks the same of every key name that our modules can build.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from adapter_registry.records import NAME_PATTERN
from adapter_registry.scripts import PREFIX


class Fate(StrEnum):
    """What becomes of a key."""

    KEPT = "kept"  # the backup holds it as it is
    DERIVED = "derived"  # a restore makes it anew from what is kept
    PASSING = "passing"  # about a moment that is over after a restore: left out


class KeyType(StrEnum):
    """Redis's own names."""

    STRING = "string"
    HASH = "hash"
    LIST = "list"
    SET = "set"
    ZSET = "zset"
    STREAM = "stream"


_PARTS = {
    "<tenant>": f"(?P<tenant>{NAME_PATTERN.strip('^$')})",
    "<adapter>": NAME_PATTERN.strip("^$"),
    "<job>": "ftjob-[0-9a-f]{24}",
    "<import>": "imp-[0-9a-f]{24}",
    "<month>": "[0-9]{4}-[0-9]{2}",
    "<sha256>": "[0-9a-f]{64}",
}


@dataclass(frozen=True)
class Kind:
    """One kind of key: `name` is what follows `slipstream:`, with the variable parts in angle brackets."""

    name: str
    type: KeyType
    fate: Fate
    why: str = ""  # it is not kept

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the whole key."""
        parts = (_PARTS.get(part) or re.escape(part) for part in re.split("(<[a-z0-9]+>)", self.name))
        return re.compile(re.escape(PREFIX) + "".join(parts))


def _kept(type_: KeyType, *names: str) -> tuple[Kind, ...]:
    return tuple(Kind(name, type_, Fate.KEPT) for name in names)


_T = "{<tenant>}:"
_A = _T + "adapter:<adapter>:"
KINDS = (
    *_kept(
        KeyType.HASH,
        *(_A + part for part in ("versions", "digests", "aliases", "before", "splits", "guards")),
        *(_T + part for part in ("numbers", "files", "files:uses", "jobs", "job:<job>:events", "job:<job>:checkpoints")),
        *(_T + part for part in ("keys", "keys:used", "users", "imports", "imports:parts:<import>", "usage:<month>")),
        *(_T + part for part in ("webhooks", "webhooks:places", "webhooks:deliveries")),
    ),
    *_kept(
        KeyType.ZSET,
        *(_T + part for part in ("files:order", "jobs:order", "job:<job>:events:order", "job:<job>:checkpoints:order")),
        _T + "imports:order",
    ),
    *_kept(KeyType.STRING, _A + "access", _T + "settings", "keys:{<sha256>}"),
    *_kept(KeyType.SET, _T + "imports:open"),
    *_kept(KeyType.LIST, _A + "moves"),
    *_kept(KeyType.STREAM, _T + "audit"),
    Kind(_T + "names", KeyType.SET, Fate.DERIVED, "adapters that have a version"),
    Kind(_T + "refs", KeyType.HASH, Fate.DERIVED, "counted from versions, files and parts"),
    Kind(_T + "sizes", KeyType.HASH, Fate.DERIVED, "counted from versions and files"),
    Kind(_T + "shared", KeyType.SET, Fate.DERIVED, "from what each adapter says of its access"),
    Kind("public", KeyType.SET, Fate.DERIVED, "from what each adapter says of its access"),
    Kind("tenants", KeyType.SET, Fate.DERIVED, "all that are in the backup"),
    Kind("schema", KeyType.STRING, Fate.DERIVED, "in the backup's manifest"),
    Kind("{jobs}:active", KeyType.ZSET, Fate.DERIVED, "jobs that have not ended; the rounds end or restart lost ones"),
    Kind("{jobs}:slots", KeyType.SET, Fate.DERIVED, "those of them that have been started"),
    Kind("{imports}:open", KeyType.SET, Fate.DERIVED, "imports that have not ended"),
    Kind("{imports}:due", KeyType.SET, Fate.DERIVED, "those of them that somebody is to work on"),
    Kind("{webhooks}:tenants", KeyType.SET, Fate.DERIVED, "tenants with webhooks"),
    Kind(_T + "garbage", KeyType.ZSET, Fate.PASSING, "what nothing refers to; gateways look for it at their start"),
    Kind(_T + "deleting", KeyType.ZSET, Fate.PASSING, "a sweep's marks"),
    Kind(_T + "rates", KeyType.HASH, Fate.PASSING, "what is left of a minute's quota"),
    Kind(_T + "running", KeyType.ZSET, Fate.PASSING, "leases of requests in flight"),
    Kind(_T + "active", KeyType.ZSET, Fate.PASSING, "`running`, as earlier versions called it"),
    Kind(_T + "settled", KeyType.ZSET, Fate.PASSING, "requests that ended lately, so that none counts twice"),
    Kind(_T + "webhooks:lease", KeyType.STRING, Fate.PASSING, "which gateway delivers now"),
    Kind(_A + "outcomes", KeyType.HASH, Fate.PASSING, "what became of an alias's requests in its guard's last window"),
    Kind(_A + "noted", KeyType.ZSET, Fate.PASSING, "what was told of them lately"),
    Kind("changes", KeyType.STREAM, Fate.PASSING, "hints for replicas that run now"),
)  # fmt: skip
# The few that are of all tenants come first: their hash tags look like tenants called jobs, imports and webhooks.
_IN_ORDER = sorted(KINDS, key=lambda kind: "<tenant>" in kind.name)


@dataclass(frozen=True, slots=True)
class Placed:
    """A key of a kind that is known."""

    kind: Kind
    tenant: str | None  # whose it is; None: of all


def kind_of(key: str) -> Placed | None:
    """Of what kind a key is, if of any."""
    for kind in _IN_ORDER:
        if found := kind.pattern.fullmatch(key):
            return Placed(kind, found.groupdict().get("tenant"))
    return None
