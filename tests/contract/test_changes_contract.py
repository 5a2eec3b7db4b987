"""One suite for every `ChangeFeed`: what replicas hear of what a store did."""

from __future__ import annotations

import asyncio
import time

from support.drafts import draft, publish

from adapter_registry.changes import Change, ChangeFeed
from adapter_registry.records import Split
from adapter_registry.store import Store


async def heard(changes: ChangeFeed, place: str) -> list[Change]:
    return list((await changes.listen(place, 0.05))[0])


async def test_aliases_that_move_and_versions_that_go(store: Store, changes: ChangeFeed) -> None:
    place = await changes.now()
    one, two, three = [(await publish(store, draft(letter))).digest for letter in "abc"]
    await store.set_alias("acme", "sql", "prod", 1)  # nothing was there before
    assert await heard(changes, place) == []
    await store.set_alias("acme", "sql", "prod", 2)
    await store.set_alias("acme", "sql", "prod", 2, split=Split(version=3, weight=0.1))
    await store.roll_back_alias("acme", "sql", "prod")  # the split goes
    await store.roll_back_alias("acme", "sql", "prod")
    copy = await publish(store, draft("c", name="copy"))  # the same content elsewhere: it is not gone with the first
    await store.delete("acme", "sql", 3)
    assert (await changes.listen(place, 0.05))[0][-1].gone is None
    assert copy.digest == three
    await store.delete("acme", "copy")
    assert await heard(changes, place) == [
        Change(tenant="acme", coming=two, instead_of=one),
        Change(tenant="acme", coming=three, instead_of=two),
        Change(tenant="acme", coming=one, instead_of=two),
        Change(tenant="acme", gone=three),
    ]
    assert await heard(changes, await changes.now()) == []


async def test_who_listens_is_woken(store: Store, changes: ChangeFeed) -> None:
    place, change = await changes.now(), Change(tenant="acme", gone="sha256:" + "0" * 64)
    listening = asyncio.create_task(changes.listen(place, 30))
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await changes.tell(change)
    found, after = await listening
    if not found:  # a twin may wait for less than it is asked to
        found, after = await changes.listen(after, 30)
    assert found == [change]
    assert time.monotonic() - began < 5
    await changes.tell(change)
    assert await heard(changes, after) == [change]


async def test_a_place_is_kept_over_silence(store: Store, changes: ChangeFeed) -> None:
    found, place = await changes.listen(await changes.now(), 0.02)
    assert list(found) == []
    await changes.tell(Change(tenant="acme", gone="sha256:" + "0" * 64))
    assert len(await heard(changes, place)) == 1
