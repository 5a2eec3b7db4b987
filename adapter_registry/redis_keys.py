"""The part of `RedisStore` that says who may call: keys, and the users whom they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from adapter_registry.errors import NotPublished
from adapter_registry.keys import KeyRecord, UserRecord
from adapter_registry.records import AuditAction, check_sha256, utc_now
from adapter_registry.redis_connection import RedisConnection
from adapter_registry.scripts import TENANTS_KEY, TenantKeys, lookup_key
from adapter_registry.store import AUDIT_KEPT, no_such_user, no_user


class RedisKeys(RedisConnection):
    """Needs the scripts `write_key` and `write_user`."""

    async def put_key(self, key: KeyRecord, by: str = "") -> None:
        """Keep a key. Raises `NotPublished` when it belongs to a user that there is not, or who may less than it."""
        await self._command("SADD", TENANTS_KEY, key.tenant)
        # Two slots, so no single script. Listed first and usable last: a crash in between leaves a key that people
        # can see and revoke but that opens nothing. The other order could leave one that opens and cannot be seen.
        if not await self._write_key(key, "keep", by, AuditAction.KEY_CREATED):
            raise no_such_user(key)
        await self._command("SET", lookup_key(key.sha256), _key_json(key))

    async def replace_key(self, key: KeyRecord, by: str = "") -> None:
        """Change a key's record, of the same secret. Raises `NotPublished` when it has been revoked."""
        # What it opens first, and only if it still opens something: whoever revokes it takes that away first. A crash in
        # between leaves a key that ends as it was told, and that can be changed again.
        opens = await self._command("SET", lookup_key(key.sha256), _key_json(key), "XX")
        if not opens or not await self._write_key(key, "replace", by, AuditAction.KEY_CHANGED):
            raise _no_key(key.id)

    async def find_key(self, sha256: str) -> KeyRecord | None:
        """The key whose secret has this hash."""
        found = await self._command("GET", lookup_key(check_sha256(sha256)))
        return KeyRecord.model_validate_json(found) if found else None

    async def list_keys(self, tenant: str) -> Sequence[KeyRecord]:
        """A tenant's keys, oldest first."""
        found = await self._command("HVALS", TenantKeys(tenant).api_keys)
        return sorted((KeyRecord.model_validate_json(key) for key in found), key=lambda key: (key.created_at, key.id))

    async def note_key_use(self, tenant: str, key_id: str) -> None:
        """It was used just now; unknown ones are not noted."""
        keys = TenantKeys(tenant)
        # Both are the tenant's, but a key that goes in between leaves a time that nobody reads: no script for that.
        if await self._command("HEXISTS", keys.api_keys, key_id):
            await self._command("HSET", keys.key_uses, key_id, utc_now().isoformat(timespec="minutes"))

    async def key_uses(self, tenant: str) -> Mapping[str, datetime]:
        """When each of a tenant's keys was last used, to the minute, for those that were."""
        found = await self._command("HGETALL", TenantKeys(tenant).key_uses)
        return {key_id: datetime.fromisoformat(when) for key_id, when in found.items()}

    async def delete_key(self, tenant: str, key_id: str, by: str = "") -> None:
        """Revoke. Raises `NotPublished` when there is none of this id."""
        mine = TenantKeys(tenant).api_keys
        found = await self._command("HGET", mine, key_id)
        if not found:
            raise _no_key(key_id)
        # Unusable first, unlisted last: after a crash in between, revoking again finishes the work.
        key = KeyRecord.model_validate_json(found)
        await self._command("DEL", lookup_key(key.sha256))
        await self._write_key(key, "remove", by, AuditAction.KEY_REVOKED)

    async def put_user(self, user: UserRecord, by: str = "") -> None:
        """Keep a user; keys that may more than it are lowered. A crash in between is mended by doing it again."""
        keys = TenantKeys(user.tenant)
        await self._command("SADD", TENANTS_KEY, user.tenant)
        args: list[str | int] = [user.name, user.model_dump_json(), by, AuditAction.USER_CHANGED, user.role, AUDIT_KEPT]
        await self._script("write_user", [keys.users, keys.audit], args)
        for key in await self.list_keys(user.tenant):
            if key.user == user.name and not user.role.includes(key.role):
                await self.replace_key(key.model_copy(update={"role": user.role}), by)

    async def list_users(self, tenant: str) -> Sequence[UserRecord]:
        """By name."""
        found = await self._command("HVALS", TenantKeys(tenant).users)
        return sorted(map(UserRecord.model_validate_json, found), key=lambda user: user.name)

    async def delete_user(self, tenant: str, name: str, by: str = "") -> Sequence[str]:
        """Remove a user and revoke its keys; returns their ids."""
        keys = TenantKeys(tenant)
        args: list[str | int] = [name, "", by, AuditAction.USER_REMOVED, "", AUDIT_KEPT]
        removed = await self._script("write_user", [keys.users, keys.audit], args)
        revoked = [key.id for key in await self.list_keys(tenant) if key.user == name]
        if not removed and not revoked:
            raise no_user(name)
        for key_id in revoked:
            await self.delete_key(tenant, key_id, by)
        return revoked

    async def _write_key(self, key: KeyRecord, mode: str, by: str, action: AuditAction) -> bool:
        keys = TenantKeys(key.tenant)
        about = f"{key.role} {key.label}".strip()
        args: list[str | int] = [key.id, _key_json(key), mode, by, action, about, AUDIT_KEPT, key.user or "", key.role]
        return bool(await self._script("write_key", [keys.api_keys, keys.key_uses, keys.audit, keys.users], args))


def _key_json(key: KeyRecord) -> str:
    """Without what is as it was before there was anything else: an older gateway reads such a key, too."""
    return key.model_dump_json(exclude_defaults=True)


def _no_key(key_id: str) -> NotPublished:
    return NotPublished(f"There is no key {key_id[:80]!r}: list the keys to see their ids.")
