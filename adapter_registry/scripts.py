"""Where things are in Redis: every key name, and the Lua scripts that change several keys at once.

All of a tenant's keys carry `{tenant}` as cluster hash tag, so each script touches a single slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from importlib import resources

from adapter_registry.records import check_name

PREFIX = "slipstream:"
SCHEMA_KEY = PREFIX + "schema"
TENANTS_KEY = PREFIX + "tenants"
CHANGES_KEY = PREFIX + "changes"  # stream: what replicas may want to know
PUBLIC_KEY = PREFIX + "public"  # set: `tenant/name` of adapters that everybody may call, and perhaps of some that were
ALIAS_SCRIPTS = ("resolve", "set_alias", "note_outcome")
SCRIPTS = (
    "publish", "describe", "delete", "set_access", "replace_version", "write_key", "write_user", "claim", "adopt",
    "begin_sweep", *ALIAS_SCRIPTS,
)  # fmt: skip


def load_script(name: str) -> str:
    """The text of `lua/<name>.lua`, behind the functions that it says it uses."""
    text = (resources.files("adapter_registry") / "lua" / f"{name}.lua").read_text(encoding="utf-8")
    needed = re.match(r"-- With (\w+)\.lua\.\n", text)
    return load_script(needed.group(1)) + text if needed else text


def lookup_key(sha256: str) -> str:
    """Where the API key with this hash is found before its tenant is known."""
    return f"{PREFIX}keys:{{{sha256}}}"


@dataclass(frozen=True)
class AdapterKeys:
    """The keys of one adapter."""

    versions: str  # hash: number -> envelope {record, digest, blobs}; the record lacks its number
    digests: str  # hash: digest -> number
    aliases: str  # hash: alias -> number
    access: str  # JSON: who else may call it
    moves: str  # list of JSON: what became of its aliases, newest first
    before: str  # hash: alias -> number before its last move
    splits: str  # hash: alias -> JSON: what part of its requests goes where
    guards: str  # hash: alias -> JSON: when it rolls back
    outcomes: str  # hash: alias|version|counter|window -> number
    noted: str  # zset: id of what was told of them -> seconds


class TenantKeys:
    """The keys of one tenant; a tenant name that breaks the rules never becomes part of a key."""

    def __init__(self, tenant: str) -> None:
        base = f"{PREFIX}{{{check_name(tenant, 'tenant')}}}:"
        self._base = base
        self.names = base + "names"  # set: adapters that have a version
        self.numbers = base + "numbers"  # hash: name -> last version number given, kept after deletes
        self.refs = base + "refs"  # hash: sha256 -> versions that name it; never 0
        self.garbage = base + "garbage"  # zset: sha256 without refs -> ms since when (claimed or released)
        self.sizes = base + "sizes"  # hash: sha256 in refs -> bytes; `total` -> bytes of all
        self.settings = base + "settings"  # JSON: quota and weight
        self.files = base + "files"  # hash: id -> record of a training file
        self.deleting = base + "deleting"  # zset: sha256 a sweeper is removing -> ms since when
        self.api_keys = base + "keys"  # hash: key id -> record
        self.users = base + "users"  # hash: name -> record
        self.shared = base + "shared"  # set: `tenant/name` of others' adapters that it may call, or might once
        self.audit = base + "audit"  # stream: who did what
        self.key_uses = base + "keys:used"  # hash: key id -> ISO time

    def adapter(self, name: str) -> AdapterKeys:
        """The keys of one of this tenant's adapters."""
        base = f"{self._base}adapter:{check_name(name)}:"
        return AdapterKeys(**{field.name: base + field.name for field in fields(AdapterKeys)})
