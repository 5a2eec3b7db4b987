"""Every key name that our modules can build is of a kind for which somebody has decided what a backup does with it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

import adapter_registry
from adapter_registry.backup.kinds import KINDS, Fate, kind_of
from adapter_registry.scripts import PREFIX, AdapterKeys, TenantKeys, lookup_key

SHA = "a" * 64
# What builders that take something are called with; one that is not here fails the test below.
ARGUMENTS: dict[str, list[tuple[str, ...]]] = {
    "adapter": [("sql",)],
    "of_job": [("ftjob-" + "0" * 24, "events"), ("ftjob-" + "0" * 24, "checkpoints")],
    "usage": [("2026-11",)],
    "parts": [("imp-" + "0" * 24,)],
}


def registry_modules() -> Iterator[object]:
    for found in pkgutil.walk_packages(adapter_registry.__path__, "adapter_registry."):
        yield importlib.import_module(found.name)


def flat(value: object) -> Iterator[str]:
    """Key names in what a builder has or gives."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from flat(part)
    elif isinstance(value, AdapterKeys):
        for field in fields(value):
            yield getattr(value, field.name)


def subclasses(of: type) -> Iterator[Any]:
    yield of
    below: list[type] = of.__subclasses__()
    for narrower in below:
        yield from subclasses(narrower)


def built_keys() -> set[str]:
    """By every builder and constant of the registry's modules."""
    modules = list(registry_modules())
    found = {lookup_key(SHA)}
    for module in modules:
        for name, value in vars(module).items():
            if name.endswith("_KEY") and isinstance(value, str) and value.startswith(PREFIX):
                found.add(value)
    for builder in subclasses(TenantKeys):
        keys = builder("acme")
        for name, value in vars(keys).items():
            if not name.startswith("_"):
                found |= set(flat(value))
        for name, method in inspect.getmembers(keys, inspect.ismethod):
            if not name.startswith("_"):
                assert name in ARGUMENTS, f"{builder.__module__}: say here what {name} is called with"
                for arguments in ARGUMENTS[name]:
                    found |= set(flat(method(*arguments)))
    return found


def test_every_key_is_of_a_kind() -> None:
    built = built_keys()
    assert len(built) > 40
    assert [key for key in sorted(built) if kind_of(key) is None] == []


def test_every_kind_is_built_by_somebody() -> None:
    """All but those of earlier versions."""
    used = {placed.kind for key in built_keys() if (placed := kind_of(key))}
    assert {kind.name for kind in KINDS} - {kind.name for kind in used} == {"{<tenant>}:active"}


def test_what_is_left_out_says_why() -> None:
    assert [kind.name for kind in KINDS if kind.fate is not Fate.KEPT and not kind.why] == []


@pytest.mark.parametrize(
    "key", ["slipstream:{acme}:new", "slipstream:new", "slipstream:{acme}:adapter:sql:new", "other:schema"]
)
def test_what_nobody_decided_on_is_of_no_kind(key: str) -> None:
    assert kind_of(key) is None


@pytest.mark.parametrize("tenant", ["jobs", "imports", "webhooks", "keys", "a.b_c-d", "0"])
def test_no_tenant_is_called_like_what_is_of_all(tenant: str) -> None:
    """A tenant may be called like a hash tag of ours, and still shares no key with it."""
    for builder in subclasses(TenantKeys):
        mine = {key for name, value in vars(builder(tenant)).items() if name[0] != "_" for key in flat(value)}
        assert {placed.tenant for key in mine if (placed := kind_of(key))} == {tenant}
