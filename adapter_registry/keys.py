"""API keys, and the users whom they belong to: made here, shown once, kept only as a hash."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import StringConstraints

from adapter_registry.records import Frozen, Name, Sha256, check_name, utc_now

SECRET_PREFIX = "sk-slip-"  # noqa: S105 - a marker that secret scanners can look for, not a secret
_SECRET_BYTES = 32
_SHOWN_CHARS = 12  # the marker and 4 characters: enough to tell keys apart, 24 of 256 bits given away


class Role(StrEnum):
    """What a key may do; each may what those before it may."""

    CALLER = "caller"  # call models and list them
    PUBLISHER = "publisher"  # publish and delete adapters, move aliases, read files, train
    ADMIN = "admin"  # manage the tenant's keys

    def includes(self, other: Role) -> bool:
        """Whether it may what the other may."""
        order = list(Role)
        return order.index(self) >= order.index(other)


UserName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@+-]{0,99}$")]


class UserRecord(Frozen):
    """A person or program of a tenant, to whom keys belong; none of them may more than this says."""

    tenant: Name
    name: UserName
    role: Role = Role.PUBLISHER
    created_at: datetime


class KeyRecord(Frozen):
    """An API key at rest: the secret itself is never stored."""

    id: str
    tenant: Name
    sha256: Sha256  # of the secret; keys are 256 random bits, so a plain hash cannot be guessed back
    prefix: str  # the first characters, so that people can tell keys apart
    created_at: datetime
    label: str = ""
    role: Role = Role.PUBLISHER
    models: tuple[str, ...] | None = None  # base models and adapters (without a version) that it may call; None = all
    expires_at: datetime | None = None
    replaced_by: str | None = None  # id of its heir
    user: UserName | None = None  # whose it is

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and self.expires_at <= now


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
