"""The `Store` contract, second half: references to blobs, claims and sweeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from support.drafts import draft, publish, sha

from adapter_registry.errors import BlobMissing, StoreUnavailable
from adapter_registry.store import Store

MakeStore = Callable[..., Store]


async def test_a_blob_is_garbage_only_when_the_last_version_lets_go(store: Store) -> None:
    one, two = draft("a", attachment="card"), draft("b", attachment="card")
    for made in (one, two):
        await publish(store, made)
    assert await store.begin_sweep("acme", 0) == []
    await store.delete("acme", "sql", 1)
    only_one = set(one.blob_sha256s) - set(two.blob_sha256s)
    assert set(await store.begin_sweep("acme", 0)) == only_one == {sha("a"), one.digest.removeprefix("sha256:")}
    await store.end_sweep("acme", only_one)
    await store.delete("acme", "sql")
    assert set(await store.begin_sweep("acme", 0)) == set(two.blob_sha256s)


async def test_one_blob_named_twice_counts_once_per_version(store: Store) -> None:
    made = draft("same", shared="same", attachment="same")
    await publish(store, made)
    await store.delete("acme", "sql")
    assert sorted(await store.begin_sweep("acme", 0)) == list(made.blob_sha256s)


async def test_the_grace_period_protects_claims_and_fresh_garbage(store: Store) -> None:
    await publish(store, draft("a"))
    await store.delete("acme", "sql")
    await store.claim_blobs("acme", [sha("new")])
    assert await store.begin_sweep("acme", 60) == []
    assert sha("new") in await store.begin_sweep("acme", 0)


async def test_claiming_again_starts_the_grace_period_again(store: Store) -> None:
    await store.claim_blobs("acme", [sha("old"), sha("kept")])
    await asyncio.sleep(0.15)
    await store.claim_blobs("acme", [sha("kept")])
    assert await store.begin_sweep("acme", 0.1) == [sha("old")]


async def test_an_upload_that_is_never_published_is_swept(store: Store) -> None:
    await store.claim_blobs("acme", [sha("orphan")])
    assert await store.begin_sweep("acme", 0) == [sha("orphan")]
    await store.end_sweep("acme", [sha("orphan")])
    assert await store.begin_sweep("acme", 0) == []


async def test_a_claim_waits_for_the_sweep_to_end(store: Store) -> None:
    await store.claim_blobs("acme", [sha("a")])
    assert await store.begin_sweep("acme", 0) == [sha("a")]
    claim = asyncio.create_task(store.claim_blobs("acme", [sha("a"), sha("b")]))
    await asyncio.sleep(0.1)
    assert not claim.done()
    await store.end_sweep("acme", [sha("a")])
    await asyncio.wait_for(claim, 5)
    assert set(await store.begin_sweep("acme", 0)) == {sha("a"), sha("b")}


async def test_a_claim_does_not_wait_for_ever(make_store: MakeStore) -> None:
    store = make_store(claim_wait_s=0.1)
    await store.claim_blobs("acme", [sha("a")])
    await store.begin_sweep("acme", 0)
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.claim_blobs("acme", [sha("a"), sha("b")])
    assert time.monotonic() - started < 2
    await store.end_sweep("acme", [sha("a")])
    assert await store.begin_sweep("acme", 0) == []  # the refused claim left no half of itself behind


async def test_a_publish_during_the_sweep_is_refused_until_claimed_again(store: Store) -> None:
    made = draft("a")
    await store.claim_blobs("acme", made.blob_sha256s)
    gone = await store.begin_sweep("acme", 0)  # the upload took longer than the grace period
    with pytest.raises(BlobMissing):
        await store.publish(made)
    await store.end_sweep("acme", gone)
    with pytest.raises(BlobMissing):
        await store.publish(made)
    assert (await publish(store, made)).version == 1
    assert await store.begin_sweep("acme", 0) == []


async def test_two_sweepers_share_the_work_and_a_dead_one_is_followed_up(make_store: MakeStore) -> None:
    store = make_store(sweep_lease_s=0.2)
    await store.claim_blobs("acme", [sha("a")])
    both = await asyncio.gather(store.begin_sweep("acme", 0), store.begin_sweep("acme", 0))
    assert sorted(map(len, both)) == [0, 1]
    await asyncio.sleep(0.25)
    assert await store.begin_sweep("acme", 60) == [sha("a")]
    assert await store.begin_sweep("acme", 60) == []


async def test_blobs_that_nobody_knows_are_adopted_as_garbage(store: Store) -> None:
    made = await publish(store, draft("a"))
    await store.claim_blobs("acme", [sha("claimed"), sha("leaving")])
    assert sha("leaving") in await store.begin_sweep("acme", 0)
    await store.claim_blobs("acme", [sha("fresh")])
    await asyncio.sleep(0.15)
    known = [*made.blob_sha256s, sha("fresh"), sha("leaving")]
    assert await store.adopt_blobs("acme", [*known, sha("orphan")]) == 1
    assert await store.adopt_blobs("acme", [sha("orphan")]) == 0
    assert await store.adopt_blobs("acme", []) == 0
    assert await store.begin_sweep("acme", 0.1) == [sha("fresh")], "its time did not begin anew"
    assert await store.begin_sweep("acme", 0) == [sha("orphan")]
