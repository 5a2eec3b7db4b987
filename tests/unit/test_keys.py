"""API keys."""

from __future__ import annotations

import hashlib

import pytest

from adapter_registry.errors import InvalidName
from adapter_registry.keys import hash_key, new_key, same_secret


def test_a_key_is_random_and_its_record_does_not_hold_it() -> None:
    secret, record = new_key("acme", "laptop")
    assert secret.startswith("sk-slip-")
    assert len(secret) == len("sk-slip-") + 43  # 32 bytes in base64url
    assert record.id.startswith("key_")
    assert (record.tenant, record.label) == ("acme", "laptop")
    assert record.sha256 == hashlib.sha256(secret.encode()).hexdigest() == hash_key(secret)
    assert secret[12:] not in record.model_dump_json()
    assert record.prefix == secret[:12]


def test_keys_differ() -> None:
    made = [new_key("acme") for _ in range(100)]
    assert len({secret for secret, _ in made}) == len({record.id for _, record in made}) == 100


def test_a_tenant_needs_a_legal_name() -> None:
    with pytest.raises(InvalidName):
        new_key("Acme Inc")


@pytest.mark.parametrize("secret", ["", "ünïcode", "\ud800", "a\x00b"])
def test_anything_has_a_hash(secret: str) -> None:
    assert len(hash_key(secret)) == 64


def test_comparing_secrets() -> None:
    assert same_secret("sk-admin", "sk-admin")
    assert not same_secret("sk-admin", "sk-admim")
    assert not same_secret("", "sk-admin")
    assert not same_secret("", "")  # no admin key set: nobody is the admin
    assert not same_secret("\udcff", "sk-admin")
