"""API keys: made here, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime

from adapter_registry.records import KeyRecord, Role, check_name, utc_now

SECRET_PREFIX = "sk-slip-"  # noqa: S105 - a marker that secret scanners can look for, not a secret
_SECRET_BYTES = 32
_SHOWN_CHARS = 12  # the marker and 4 characters: enough to tell keys apart, 24 of 256 bits given away


def hash_key(secret: str) -> str:
    """The sha256 under which a key is stored and found."""
    # surrogatepass: whatever a header decodes to has a hash, so a strange key is unknown rather than an error.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(
    tenant: str,
    label: str = "",
    role: Role = Role.PUBLISHER,
    models: tuple[str, ...] | None = None,
    expires_at: datetime | None = None,
    user: str | None = None,
) -> tuple[str, KeyRecord]:
    """A fresh secret and the record to keep; the secret exists nowhere else."""
    secret = SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    record = KeyRecord(
        id="key_" + secrets.token_hex(8),
        tenant=check_name(tenant, "tenant"),
        sha256=hash_key(secret),
        prefix=secret[:_SHOWN_CHARS],
        created_at=utc_now(),
        label=label,
        role=role,
        models=models,
        expires_at=expires_at,
        user=user,
    )
    return secret, record


def same_secret(given: str, expected: str) -> bool:
    """Compare a secret with the admin key in constant time; an empty expected key matches nothing."""
    equal = hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode("utf-8", "surrogatepass"))
    return equal and bool(expected)
