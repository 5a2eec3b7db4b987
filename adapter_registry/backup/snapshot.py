"""One tenant's records at one moment: reading them, what they refer to, and whether they agree with each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from adapter_registry.backup.kinds import KINDS, Fate, KeyType, Kind, kind_of
from adapter_registry.backup.parallel import for_each
from adapter_registry.backup.records import Item
from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.jobs import JobRecord
from adapter_registry.migrations import blob_sizes
from adapter_registry.records import Access, utc_now
from adapter_registry.scripts import PREFIX, lookup_key

_LOGS = (":events", ":events:order", ":checkpoints", ":checkpoints:order")
_MARKS = ("garbage", "deleting")
_COUNTED = ("refs", "sizes", *_MARKS)  # read by those who want to see whether they agree with the rest: they are long
_LAST = ("numbers", "audit")  # read after adapters
_TENANTS = "{<tenant>}:"
_ADAPTERS_AT_ONCE = 50  # in one script, for some ms
_READ_AT_ONCE = 16


@dataclass(frozen=True)
class Snapshot:
    """A tenant's keys, as `take_snapshot` reads them or a backup holds them."""

    tenant: str
    items: Mapping[str, Item]

    @property
    def kept(self) -> list[Item]:
        """What a backup holds."""
        return [item for item in self.items.values() if _fate(item.key) is Fate.KEPT]

    def hash(self, name: str) -> dict[str, str]:
        """What is under `slipstream:{tenant}:<name>`, a hash or sorted set."""
        item = self.items.get(self.key(name))
        return item.pairs() if item else {}

    def members(self, name: str) -> list[str]:
        """The same of a set, or of what a hash or sorted set is about."""
        item = self.items.get(self.key(name))
        return item.members() if item else []

    def key(self, name: str) -> str:
        """A key of this tenant."""
        return f"{PREFIX}{{{self.tenant}}}:{name}"

    @cached_property
    def adapters(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Name → number → version as it is stored, of all adapters that have one."""
        before, after = self.key("adapter:"), ":versions"
        return {
            key.removeprefix(before).removesuffix(after): {int(n): json.loads(v) for n, v in item.pairs().items()}
            for key, item in self.items.items()
            if key.startswith(before) and key.endswith(after)
        }

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        """Id → training file as it is stored."""
        return {id_: json.loads(record) for id_, record in self.hash("files").items()}

    @cached_property
    def jobs(self) -> list[JobRecord]:
        """All of them."""
        return [JobRecord.model_validate_json(text.partition(" ")[2]) for text in self.hash("jobs").values()]

    @cached_property
    def named_by(self) -> dict[str, list[str]]:
        """sha256 of a blob → what refers to it, for people; one entry for each reference."""
        found: dict[str, list[str]] = {}
        for name, versions in self.adapters.items():
            for number, envelope in versions.items():
                for sha in envelope["blobs"]:
                    found.setdefault(sha, []).append(f"{name}@{number}")
        for id_, record in self.files.items():
            found.setdefault(record["sha256"], []).append(id_)
        for import_id in self.members("imports:open"):
            for sha in self.hash(f"imports:parts:{import_id}").values():
                found.setdefault(sha, []).append(import_id)
        return found

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every blob that counts against the quota: what versions and files name."""
        found: dict[str, int] = {}
        for versions in self.adapters.values():
            for envelope in versions.values():
                found |= blob_sizes(envelope)
        return found | {record["sha256"]: int(record["size"]) for record in self.files.values()}

    def access(self) -> dict[str, Access]:
        """Name → who else may call it, of adapters that say so."""
        found = {name: self.items.get(self.key(f"adapter:{name}:access")) for name in self.adapters}
        return {name: Access.model_validate_json(item.entries[0][0]) for name, item in found.items() if item}

    def counted(self) -> list[Item]:
        """References to blobs and their sizes, and the list of adapters, as they must be."""
        refs = tuple(sorted((sha, str(len(by))) for sha, by in self.named_by.items()))
        sizes = {sha: str(size) for sha, size in self.sizes.items()}
        if sizes:
            sizes["total"] = str(sum(self.sizes.values()))
        made = {"refs": refs, "sizes": tuple(sorted(sizes.items()))}
        names = Item(key=self.key("names"), type=KeyType.SET, entries=tuple((name,) for name in sorted(self.adapters)))
        hashes = [Item(key=self.key(name), type=KeyType.HASH, entries=entries) for name, entries in made.items()]
        return [item for item in (names, *hashes) if item.entries]

    def problems(self) -> list[str]:
        """Where records do not agree with each other, if it was taken `to_compare`; none after whatever crash."""
        return [
            f"{self.tenant}: {text}"
            for text in (*self._blob_problems(), *self._adapter_problems(), *self._job_problems())
        ]

    def _blob_problems(self) -> Iterable[str]:
        refs, kept = self.hash("refs"), self.hash("sizes")
        for sha in sorted(refs.keys() | self.named_by.keys()):
            found, due = int(refs.get(sha, 0)), len(self.named_by.get(sha, ()))
            if found != due:
                yield f"blob {sha} has {found} references, and {due} name it"
        total = int(kept.pop("total", 0))
        if total != sum(map(int, kept.values())):
            yield f"the sum of stored bytes is {total}, and all blobs together have {sum(map(int, kept.values()))}"
        for sha, size in sorted(self.sizes.items()):
            if kept.get(sha) != str(size):
                yield f"blob {sha} has {size} bytes, and counts as {kept.get(sha, 'nothing')}"
        for sha in sorted(kept.keys() - refs.keys()):
            yield f"blob {sha} counts against the quota, and nothing names it"
        for mark in _MARKS:
            for sha in sorted(self.named_by.keys() & set(self.members(mark))):
                yield f"blob {sha} is in use and marked as {mark}"

    def _adapter_problems(self) -> Iterable[str]:
        if set(self.members("names")) != set(self.adapters):
            yield "the list of adapters is not that of adapters with versions"
        numbers = self.hash("numbers")
        for name, versions in sorted(self.adapters.items()):
            digests = {envelope["digest"]: str(number) for number, envelope in versions.items()}
            if self.hash(f"adapter:{name}:digests") != digests:
                yield f"{name}: digests do not lead to its versions"
            if int(numbers.get(name, 0)) < max(versions):
                yield f"{name}: the next version's number was given already"
            pinned = self.hash(f"adapter:{name}:aliases")
            splits = {alias: json.loads(text)["version"] for alias, text in self.hash(f"adapter:{name}:splits").items()}
            for alias, number in (*pinned.items(), *splits.items()):
                if int(number) not in versions:
                    yield f"{name}@{alias} leads to version {number}, which is not there"

    def _job_problems(self) -> Iterable[str]:
        for what in ("files", "jobs", "imports"):
            if set(self.members(what)) != set(self.members(f"{what}:order")):
                yield f"the order of {what} is not of those that are there"
        uses = Counter(file for job in self.jobs if not job.state.is_terminal for file in job.files)
        if {id_: int(count) for id_, count in self.hash("files:uses").items()} != dict(uses):
            yield "files are not held by just those jobs that have not ended"


async def take_snapshot(data: RegistryData, tenant: str, seen: Iterable[str], *, to_compare: bool = False) -> Snapshot:
    """Of a tenant; `seen` are those of its keys that were there a moment ago; `to_compare` adds what `problems` needs.

    Each adapter is read at one moment, some of them together, and so is what stands beside adapters: a script that read
    all of a large tenant would keep Redis waiting. The order makes up for the rest: adapters after jobs and imports, which
    name what they have made; numbers given and the audit log after adapters, so that neither lacks what is there.
    """
    empty = Snapshot(tenant, {})
    beside = {key for key in seen if _is_beside(key, tenant)} | _keys_beside(empty)
    while True:
        first = Snapshot(tenant, await data.read(beside))
        more = _keys_beside(first) - beside
        if not more:
            break
        beside |= more  # somebody has just made them
    items = dict(first.items)

    async def read(some: Sequence[str]) -> None:
        items.update(await data.read(some))

    names = first.members("names")
    some_names = [names[i : i + _ADAPTERS_AT_ONCE] for i in range(0, len(names), _ADAPTERS_AT_ONCE)]
    await for_each([[key for name in some for key in _keys_of(first, name)] for some in some_names], read, 1)
    for name in set(names) - Snapshot(tenant, items).adapters.keys():  # deleted meanwhile
        for key in _keys_of(first, name):
            items.pop(key, None)
    logs = [[first.key(f"job:{job_id}{log}") for log in _LOGS] for job_id in first.members("jobs")]
    lookups = [[lookup_key(json.loads(record)["sha256"])] for record in first.hash("keys").values()]
    last = [[first.key(name)] for name in (*_LAST, *(_COUNTED if to_compare else ()))]
    await for_each([*logs, *lookups, *last], read, _READ_AT_ONCE)
    return Snapshot(tenant, items)


def _keys_beside(snapshot: Snapshot) -> set[str]:
    """What stands beside adapters, and is read at one moment."""
    now: datetime = utc_now()
    holes = {
        "<import>": snapshot.members("imports:open"),
        "<month>": {f"{now + timedelta(days=days):%Y-%m}" for days in (-1, 0, 1)},
    }
    found = set()
    for kind in KINDS:
        if not _stands_beside(kind):
            continue
        name = kind.name.removeprefix(_TENANTS)
        hole = next((hole for hole in holes if hole in name), None)
        found |= {snapshot.key(name.replace(hole, value)) for value in holes[hole]} if hole else {snapshot.key(name)}
    return found


def _stands_beside(kind: Kind) -> bool:
    name = kind.name.removeprefix(_TENANTS)
    other = name == kind.name or "<adapter>" in name or "<job>" in name or name in _LAST
    return not other and (kind.fate is Fate.KEPT or name == "names")


def _is_beside(key: str, tenant: str) -> bool:
    placed = kind_of(key)
    return placed is not None and placed.tenant == tenant and _stands_beside(placed.kind)


def _keys_of(snapshot: Snapshot, adapter: str) -> list[str]:
    """Of one adapter, those that are kept."""
    kept = (kind.name for kind in KINDS if "<adapter>" in kind.name and kind.fate is Fate.KEPT)
    return [snapshot.key(name.removeprefix(_TENANTS).replace("<adapter>", adapter)) for name in kept]


def _fate(key: str) -> Fate | None:
    placed = kind_of(key)
    return placed.kind.fate if placed else None
