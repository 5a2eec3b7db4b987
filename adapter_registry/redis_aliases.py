"""The part of `RedisStore` that names lead through: what a reference means, aliases that move, and what becomes of them."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress

from adapter_registry.changes import Change
from adapter_registry.errors import NotPublished, StoreUnavailable
from adapter_registry.records import (
    AdapterVersion,
    AliasMove,
    Guard,
    Outcome,
    Route,
    Split,
    VersionSelector,
    Watch,
    check_alias,
    check_name,
    utc_now,
)
from adapter_registry.redis_changes import told
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import TenantKeys
from adapter_registry.store import AUDIT_KEPT, MOVES_KEPT, UNGUARDED_WINDOW_S


class RedisAliases(RedisConnection):
    """Needs the scripts `ALIAS_SCRIPTS`."""

    async def route(self, tenant: str, selector: VersionSelector, point: float | None = None) -> Route:
        """What a reference means, on this side of an alias's split. Raises `NotPublished`."""
        owner = selector.tenant or tenant
        keys = TenantKeys(owner).adapter(selector.name)
        value = selector.version or selector.alias or selector.digest or ""
        found = await self._script(
            "resolve",
            [keys.versions, keys.aliases, keys.digests, keys.access, keys.splits, keys.guards],
            [
                selector.by,
                value,
                "" if owner == tenant else check_name(tenant, "tenant"),
                "" if point is None else repr(point),
            ],
        )
        if not found:
            raise not_published(selector.name)
        number, envelope, alias, *shadow = found
        return Route(
            version=version_of(number, envelope),
            watch=Watch(tenant=owner, name=selector.name, alias=alias) if alias else None,
            shadow=version_of(*shadow) if shadow else None,
        )

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
        await self._move(tenant, name, alias, str(version), by, split, guard)

    async def roll_back_alias(self, tenant: str, name: str, alias: str, by: str = "") -> int:
        """Point an alias at where it pointed before its last move; returns the version. Raises `NotPublished`."""
        return await self._move(tenant, name, alias, "back", by)

    async def delete_alias(self, tenant: str, name: str, alias: str, by: str = "") -> None:
        """Remove an alias. Raises `NotPublished`."""
        await self._move(tenant, name, alias, "", by)

    async def alias_moves(self, tenant: str, name: str) -> Sequence[AliasMove]:
        """What became of an adapter's aliases, newest first; the last `MOVES_KEPT`."""
        found = await self._command("LRANGE", TenantKeys(tenant).adapter(name).moves, "0", "-1")
        return [AliasMove.model_validate_json(line) for line in found]

    async def note_outcome(self, watch: Watch, version: int, outcome: Outcome, told_id: str) -> str:
        """Count what became of requests; why the alias was rolled back by it, or ""."""
        noted = TenantKeys(watch.tenant).adapter(watch.name).noted
        counts = [getattr(outcome, name) for name in Outcome.model_fields]
        args: list[str | int] = [watch.alias, version, utc_now().isoformat(), MOVES_KEPT, watch.name, AUDIT_KEPT]
        args += [UNGUARDED_WINDOW_S, told_id, *counts]
        reason, *digests = await self._script("note_outcome", [*_places(watch.tenant, watch.name), noted], args)
        if digests:
            await self._tell(Change(tenant=watch.tenant, coming=digests[0], instead_of=digests[1]))
        return str(reason)

    async def outcomes(self, tenant: str, name: str) -> Mapping[tuple[str, int], Outcome]:
        """(alias, version) → what became of requests lately, of aliases that are watched."""
        keys = TenantKeys(tenant).adapter(name)
        sums = defaultdict[tuple[str, int], dict[str, int]](lambda: defaultdict(int))
        found = await self._command("HGETALL", keys.outcomes)
        stored: Mapping[str, str] = await self._command("HGETALL", keys.guards)
        guards = {alias: Guard.model_validate_json(guard) for alias, guard in stored.items()}
        for field, count in found.items():
            alias, version, counter, bucket = field.split("|")
            half = (guards[alias].window_s if alias in guards else UNGUARDED_WINDOW_S) / 2
            if int(bucket) >= int(time.time() / half) - 1:
                sums[alias, int(version)][counter] += int(count)
        return {place: Outcome(**counts) for place, counts in sorted(sums.items())}

    async def _move(
        self,
        tenant: str,
        name: str,
        alias: str,
        to: str,
        by: str,
        split: Split | None = None,
        guard: Guard | None = None,
    ) -> int:
        args: list[str | int] = [check_alias(alias), to, by, utc_now().isoformat(), MOVES_KEPT, name, AUDIT_KEPT]
        # A split without what is as it was before there was anything else: an older gateway reads it, too.
        args.append(split.model_dump_json(exclude_defaults=True) if split is not None else "")
        args.append(guard.model_dump_json() if guard is not None else "")
        answer = await self._script("set_alias", _places(tenant, name), args)
        if not answer[0]:
            raise not_published(name)
        for coming, instead_of in zip(answer[2::2], answer[3::2], strict=True):
            await self._tell(Change(tenant=tenant, coming=coming, instead_of=instead_of))
        return int(answer[1])

    async def _tell(self, change: Change) -> None:
        """A hint for replicas: what it is about has happened, so it may get lost."""
        with suppress(StoreUnavailable):
            await self._command(*told(change))


def _places(tenant: str, name: str) -> list[str]:
    """The keys of `lua/aliases.lua`."""
    keys, audit = TenantKeys(tenant).adapter(name), TenantKeys(tenant).audit
    return [keys.versions, keys.aliases, keys.before, keys.moves, audit, keys.splits, keys.guards, keys.outcomes]


def version_of(number: str, envelope: str) -> AdapterVersion:
    """A version as it is stored, with its number, which only its place knows."""
    return AdapterVersion.model_validate({**json.loads(envelope)["record"], "version": int(number)})


def not_published(name: str) -> NotPublished:
    """One text for every way of not being there, another tenant's adapter included."""
    return NotPublished(f"Nothing is published as {check_name(name)!r} under this name, version or alias.")
