"""What the fakes of the registry keep, and its aliases: how they move, what they lead to, what becomes of them."""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar

from adapter_registry.changes import Change
from adapter_registry.errors import NotPublished
from adapter_registry.keys import KeyRecord, UserRecord
from adapter_registry.records import (
    Access,
    AdapterSummary,
    AdapterVersion,
    AliasMove,
    AuditAction,
    AuditEntry,
    Guard,
    Outcome,
    Route,
    Split,
    VersionSelector,
    VersionState,
    Watch,
    check_alias,
    check_name,
    utc_now,
)
from adapter_registry.store import AUDIT_KEPT, MOVES_KEPT, UNGUARDED_WINDOW_S

T = TypeVar("T")


@dataclass
class MemoryAdapter:
    """One adapter."""

    versions: dict[int, AdapterVersion] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    access: Access = field(default_factory=Access)
    splits: dict[str, Split] = field(default_factory=dict)
    guards: dict[str, Guard] = field(default_factory=dict)
    outcomes: dict[tuple[str, int], dict[int, Outcome]] = field(default_factory=dict)  # by half window
    noted: deque[str] = field(default_factory=lambda: deque(maxlen=1000))  # ids of what was told
    before: dict[str, int] = field(default_factory=dict)  # alias -> version before its last move
    moves: deque[AliasMove] = field(default_factory=lambda: deque(maxlen=MOVES_KEPT))  # newest first


@dataclass
class MemoryTenant:
    """What is one tenant's."""

    adapters: dict[str, MemoryAdapter] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)  # last version given, kept after deletes
    refs: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)  # of what is in refs
    storage_bytes: int | None = None  # its quota; `MemoryTenants` sets it
    garbage: dict[str, float] = field(default_factory=dict)  # sha256 without refs -> since when
    deleting: dict[str, float] = field(default_factory=dict)  # sha256 a sweeper is removing -> since when
    keys: dict[str, KeyRecord] = field(default_factory=dict)
    users: dict[str, UserRecord] = field(default_factory=dict)
    key_uses: dict[str, datetime] = field(default_factory=dict)
    audit: deque[AuditEntry] = field(default_factory=lambda: deque(maxlen=AUDIT_KEPT))  # newest first


class MemoryAliases:
    """The state, and the part of `MemoryStore` that names lead through."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._tenants: dict[str, MemoryTenant] = {}
        self._entries = itertools.count()
        self.changes: list[Change] = []
        self.changed = asyncio.Event()  # something was told

    def tell(self, change: Change) -> None:
        """As `ChangeFeed.tell`; `MemoryChanges` listens."""
        self.changes.append(change)
        self.changed.set()

    async def route(self, tenant: str, selector: VersionSelector, point: float | None = None) -> Route:
        """What a reference means, on this side of an alias's split. Raises `NotPublished`."""
        owner = selector.tenant or tenant
        adapter = self._look(owner).adapters.get(selector.name, MemoryAdapter())
        found: AdapterVersion | None = None
        alias = {"default": "prod", "alias": selector.alias or ""}.get(selector.by, "")
        split, shadow = adapter.splits.get(alias), None
        if split is not None and point is not None and point < split.weight and split.shadow:
            found, shadow = adapter.versions.get(adapter.aliases.get(alias, 0)), adapter.versions.get(split.version)
        elif split is not None and point is not None and point < split.weight:
            found = adapter.versions.get(split.version)
        elif selector.by == "default":
            found = summary_of(owner, selector.name, adapter).current
        elif selector.by == "version":
            found = adapter.versions.get(selector.version or 0)
        elif selector.by == "alias":
            found = adapter.versions.get(adapter.aliases.get(selector.alias or "", 0))
        else:
            found = next((v for v in adapter.versions.values() if v.digest == selector.digest), None)
        may = owner == tenant or adapter.access.allows(check_name(tenant, "tenant"))
        if found is None or found.state is not VersionState.READY or not may:
            raise not_published(selector.name)
        watched = alias in adapter.aliases and (alias in adapter.splits or alias in adapter.guards)
        watch = Watch(tenant=owner, name=selector.name, alias=alias) if watched else None
        return Route(version=found, watch=watch, shadow=shadow)

    async def set_alias(
        self,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        by: str = "",
        split: Split | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Point an alias at a READY version, and a part of its requests at another."""
        self._move(tenant, name, alias, version, by, split, guard)

    async def roll_back_alias(self, tenant: str, name: str, alias: str, by: str = "") -> int:
        """Take an alias's split away, or point it at where it pointed before its last move. Raises `NotPublished`."""
        to = _version_before(self._adapter(tenant, name), check_alias(alias))
        if to is None:
            raise not_published(name)
        self._move(tenant, name, alias, to, by)
        return to

    async def note_outcome(self, watch: Watch, version: int, outcome: Outcome, told_id: str) -> str:
        """Count what became of requests; why the alias was rolled back by it, or ""."""
        adapter, alias = self._adapter(watch.tenant, watch.name), watch.alias
        split, guard = adapter.splits.get(alias), adapter.guards.get(alias)
        current = adapter.aliases.get(alias)
        newest = current if split is None else split.version
        if version not in (newest, current) or (split is None and guard is None) or told_id in adapter.noted:
            return ""
        adapter.noted.append(told_id)
        half = (UNGUARDED_WINDOW_S if guard is None else guard.window_s) / 2
        bucket = int(self._clock() / half)
        windows = adapter.outcomes.setdefault((alias, version), {})
        windows[bucket] = windows.get(bucket, Outcome()).plus(outcome)
        for old in [at for at in windows if at < bucket - 1]:
            del windows[old]
        reason = "" if guard is None or version != newest else _sum(windows.values()).breach(guard)
        back = _version_before(adapter, alias)
        if not reason or back is None or not self._is_ready(adapter, back):
            return ""
        self._move(watch.tenant, watch.name, alias, back, "guard", reason=reason)
        return reason

    async def outcomes(self, tenant: str, name: str) -> Mapping[tuple[str, int], Outcome]:
        """(alias, version) → what became of requests lately, of aliases that are watched."""
        mine = self._look(tenant).adapters.get(check_name(name), MemoryAdapter())
        found = {}
        for (alias, version), windows in sorted(mine.outcomes.items()):
            half = (mine.guards[alias].window_s if alias in mine.guards else UNGUARDED_WINDOW_S) / 2
            recent = [outcome for bucket, outcome in windows.items() if bucket >= int(self._clock() / half) - 1]
            if recent:
                found[alias, version] = _sum(recent)
        return found

    async def delete_alias(self, tenant: str, name: str, alias: str, by: str = "") -> None:
        """Remove an alias. Raises `NotPublished`."""
        if check_alias(alias) not in self._adapter(tenant, name).aliases:
            raise not_published(name)
        self._move(tenant, name, alias, None, by)

    async def alias_moves(self, tenant: str, name: str) -> Sequence[AliasMove]:
        """What became of an adapter's aliases, newest first; the last `MOVES_KEPT`."""
        return list(self._look(tenant).adapters.get(check_name(name), MemoryAdapter()).moves)

    def _move(
        self,
        tenant: str,
        name: str,
        alias: str,
        version: int | None,
        by: str,
        split: Split | None = None,
        guard: Guard | None = None,
        reason: str = "",
    ) -> None:
        check_alias(alias)
        adapter = self._adapter(tenant, name)
        before, split_before, guard_before = (
            adapter.aliases.get(alias), adapter.splits.get(alias), adapter.guards.get(alias),
        )  # fmt: skip
        wanted = [number for number in (version, split.version if split else None) if number is not None]
        if any(not self._is_ready(adapter, number) for number in wanted):
            raise not_published(name)
        was = adapter.versions.get(split_before.version if reason and split_before else before or 0)
        for coming in [adapter.versions[number].digest for number in wanted]:
            if was is not None and was.digest != coming:
                self.tell(Change(tenant=tenant, coming=coming, instead_of=was.digest))
        _put(adapter.aliases, alias, version)
        _put(adapter.splits, alias, split)
        _put(adapter.guards, alias, guard)
        if version != before:
            _put(adapter.before, alias, before)
        if version != before or split != split_before or guard != guard_before:
            for place in [place for place in adapter.outcomes if place[0] == alias]:
                del adapter.outcomes[place]
            move = AliasMove(
                alias=alias,
                version=version,
                before=before,
                by=by,
                at=utc_now(),
                split=split,
                guard=guard,
                reason=reason,
            )
            adapter.moves.appendleft(move)
            detail = f"{before or 'none'} to {version or 'none'}"
            if split is not None:
                detail += f", {split.weight:g} of it {'shadowed by' if split.shadow else 'to'} {split.version}"
            if reason:
                detail += f": {reason}"
            self.write_down(tenant, by, AuditAction.ALIAS_MOVED, f"{name}@{alias}", detail)

    def _is_ready(self, adapter: MemoryAdapter, number: int) -> bool:
        found = adapter.versions.get(number)
        return found is not None and found.state is VersionState.READY

    def write_down(self, tenant: str, by: str, action: AuditAction, subject: str, detail: str) -> None:
        """One entry of the audit log."""
        now = utc_now()
        id_ = f"{int(now.timestamp() * 1000)}-{next(self._entries)}"
        entry = AuditEntry(id=id_, at=now, by=by, action=action, subject=subject, detail=detail)
        self.enter(tenant).audit.appendleft(entry)

    def enter(self, tenant: str) -> MemoryTenant:
        """The tenant's state, made on the first write."""
        return self._tenants.setdefault(check_name(tenant, "tenant"), MemoryTenant())

    def _look(self, tenant: str) -> MemoryTenant:
        """The tenant's state; reading does not make a tenant."""
        return self._tenants.get(check_name(tenant, "tenant"), MemoryTenant())

    def _adapter(self, tenant: str, name: str) -> MemoryAdapter:
        adapter = self._look(tenant).adapters.get(check_name(name))
        if adapter is None:
            raise not_published(name)
        return adapter


def _put(kept: dict[str, T], alias: str, value: T | None) -> None:
    if value is None:
        kept.pop(alias, None)
    else:
        kept[alias] = value


def _version_before(adapter: MemoryAdapter, alias: str) -> int | None:
    """Where an alias goes back to: its split goes first, then its last move."""
    return adapter.aliases.get(alias) if alias in adapter.splits else adapter.before.get(alias)


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    return functools.reduce(Outcome.plus, outcomes, Outcome())


def summary_of(tenant: str, name: str, adapter: MemoryAdapter) -> AdapterSummary:
    """As it is listed."""
    newest_first = tuple(adapter.versions[number] for number in sorted(adapter.versions, reverse=True))
    return AdapterSummary(
        tenant=tenant,
        name=name,
        versions=newest_first,
        aliases=dict(adapter.aliases),
        splits=dict(adapter.splits),
        guards=dict(adapter.guards),
        access=adapter.access,
    )


def not_published(name: str) -> NotPublished:
    """One text for every way of not being there, another tenant's adapter included."""
    return NotPublished(f"Nothing is published as {name!r} under this name, version or alias.")
