"""One suite for every `Store`: whatever passes it may stand behind the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest
from support.drafts import draft, publish, sha

from adapter_registry.errors import BlobMissing, InUse, InvalidName, NotPublished
from adapter_registry.keys import Role, hash_key, new_key
from adapter_registry.records import SpeculationPolicy, VersionState, parse_reference, utc_now
from adapter_registry.store import Store


async def resolve(store: Store, text: str, tenant: str = "acme") -> int:
    return (await store.resolve(tenant, parse_reference(text))).version


# --- publishing ---


async def test_a_published_version_comes_back_exactly(store: Store) -> None:
    made = draft("a", attachment="card")
    await store.claim_blobs("acme", made.blob_sha256s)
    version, is_new = await store.publish(made)
    assert is_new
    assert (version.version, version.state) == (1, VersionState.READY)
    assert version.model_dump(exclude={"version", "state", "created_at"}) == made.model_dump()
    assert version.digest == made.digest
    assert version.created_at.tzinfo is not None
    assert await store.resolve("acme", parse_reference("sql")) == version
    assert (await store.get("acme", "sql")).versions == (version,)


async def test_versions_count_up_per_name(store: Store) -> None:
    assert [(await publish(store, draft(text))).version for text in "abc"] == [1, 2, 3]
    assert (await publish(store, draft("a", name="chat"))).version == 1


async def test_an_identical_digest_is_the_existing_version(store: Store) -> None:
    first = await publish(store, draft("a"))
    await publish(store, draft("b"))
    again = draft("a", attachment="another card").model_copy(update={"created_by": "someone else"})
    await store.claim_blobs("acme", again.blob_sha256s)
    assert await store.publish(again) == (first, False)
    assert len((await store.get("acme", "sql")).versions) == 2


async def test_an_identical_digest_under_another_name_is_another_version(store: Store) -> None:
    first = await publish(store, draft("a"))
    other = await publish(store, draft("a", name="chat"))
    assert other.digest == first.digest
    assert (other.name, other.version) == ("chat", 1)
    assert await resolve(store, f"chat@{first.digest}") == 1


async def test_concurrent_publishes_are_numbered_once_each(store: Store) -> None:
    versions = await asyncio.gather(*(publish(store, draft(f"content {i}")) for i in range(20)))
    assert sorted(v.version for v in versions) == list(range(1, 21))
    listed = (await store.get("acme", "sql")).versions
    assert [v.version for v in listed] == list(range(20, 0, -1))
    assert {v.digest: v.version for v in versions} == {v.digest: v.version for v in listed}


async def test_concurrent_publishes_of_one_content_make_one_version(store: Store) -> None:
    made = draft("same")
    await store.claim_blobs("acme", made.blob_sha256s)
    answers = await asyncio.gather(*(store.publish(made) for _ in range(20)))
    assert {version.version for version, _ in answers} == {1}
    assert [is_new for _, is_new in answers].count(True) == 1


@pytest.mark.parametrize("forgotten", ["file", "attachment", "manifest"])
async def test_publishing_needs_a_claim_on_every_blob(store: Store, forgotten: str) -> None:
    made = draft("a", attachment="card")
    skipped = {"file": sha("a"), "attachment": sha("card"), "manifest": made.digest.removeprefix("sha256:")}[forgotten]
    await store.claim_blobs("acme", set(made.blob_sha256s) - {skipped})
    with pytest.raises(BlobMissing):
        await store.publish(made)
    assert await store.list("acme") == []
    assert (await publish(store, made)).version == 1  # the refused attempt used no number up


# --- resolving ---


async def test_a_plain_name_is_the_newest_version_until_prod_says_otherwise(store: Store) -> None:
    for text in "abcdefghijkl":  # past 9, where text order and number order differ
        await publish(store, draft(text))
    assert await resolve(store, "sql") == 12
    await store.set_alias("acme", "sql", "prod", 2)
    assert await resolve(store, "sql") == 2
    current = (await store.get("acme", "sql")).current
    assert current is not None
    assert current.version == 2
    await store.delete_alias("acme", "sql", "prod")
    assert await resolve(store, "sql") == 12


async def test_every_form_of_reference(store: Store) -> None:
    first = await publish(store, draft("a"))
    await publish(store, draft("b"))
    await store.set_alias("acme", "sql", "stable", 1)
    for text in ("sql@1", "sql@stable", f"sql@{first.digest}", "acme/sql@1", "acme/sql@stable"):
        assert await store.resolve("acme", parse_reference(text)) == first
    assert await resolve(store, "acme/sql") == 2


@pytest.mark.parametrize(
    "text", ["sql@9", "sql@nope", f"sql@sha256:{'0' * 64}", "other", "other@1", "other@prod", "globex/sql", "globex/x"]
)
async def test_what_is_not_there_is_not_published(store: Store, text: str) -> None:
    await publish(store, draft("a"))
    await publish(store, draft("b", tenant="globex"))
    with pytest.raises(NotPublished):
        await resolve(store, text)


# --- aliases ---


async def test_an_alias_moves_and_goes(store: Store) -> None:
    for text in "ab":
        await publish(store, draft(text))
    await store.set_alias("acme", "sql", "canary", 1)
    await store.set_alias("acme", "sql", "canary", 2)
    assert (await store.get("acme", "sql")).aliases == {"canary": 2}
    await store.delete_alias("acme", "sql", "canary")
    assert (await store.get("acme", "sql")).aliases == {}
    with pytest.raises(NotPublished):
        await store.delete_alias("acme", "sql", "canary")


async def test_an_alias_needs_a_version_and_a_legal_name(store: Store) -> None:
    await publish(store, draft("a"))
    with pytest.raises(NotPublished):
        await store.set_alias("acme", "sql", "prod", 2)
    with pytest.raises(NotPublished):
        await store.set_alias("acme", "other", "prod", 1)
    for alias in ("12", "", "Prod", "a b", "x" * 64, "a}:b"):
        with pytest.raises(InvalidName):
            await store.set_alias("acme", "sql", alias, 1)
    assert (await store.get("acme", "sql")).aliases == {}


# --- speculation policies ---

OFF = SpeculationPolicy(enabled=False, reason="expected speed-up 1.04: ünïcode ✓")


async def test_a_policy_changes_and_nothing_else_does(store: Store) -> None:
    first = await publish(store, draft("a", attachment="card"))
    second = await publish(store, draft("b"))
    assert first.speculation == SpeculationPolicy(enabled=True, reason="")
    changed = await store.set_speculation("acme", "sql", 1, OFF)
    assert changed == first.model_copy(update={"speculation": OFF})
    assert changed.digest == first.digest
    for text in ("sql@1", f"sql@{first.digest}"):
        assert await store.resolve("acme", parse_reference(text)) == changed
    assert (await store.get("acme", "sql")).versions == (second, changed)
    assert await store.set_speculation("acme", "sql", 1, SpeculationPolicy()) == first
    assert await store.delete("acme", "sql") == [second, first]
    assert sorted(await store.begin_sweep("acme", 0)) == sorted({*first.blob_sha256s, *second.blob_sha256s})


async def test_a_version_may_begin_with_speculation_off_and_a_second_publish_leaves_it_alone(store: Store) -> None:
    made = draft("a").model_copy(update={"speculation": OFF})
    assert (await publish(store, made)).speculation == OFF
    assert made.digest == draft("a").digest
    on_again = await store.set_speculation("acme", "sql", 1, SpeculationPolicy(reason="measured again"))
    assert await store.publish(made) == (on_again, False)
    assert await store.resolve("acme", parse_reference("sql")) == on_again


async def test_policies_that_change_at_once_are_never_mixed_or_lost(store: Store) -> None:
    await publish(store, draft("a"))
    wanted = [SpeculationPolicy(enabled=i % 2 == 0, reason=f"{i}") for i in range(20)]
    answers = await asyncio.gather(*(store.set_speculation("acme", "sql", 1, policy) for policy in wanted))
    assert [answer.speculation for answer in answers] == wanted
    assert (await store.get("acme", "sql")).versions[0].speculation in wanted


async def test_a_policy_needs_a_version(store: Store) -> None:
    await publish(store, draft("a"))
    await publish(store, draft("b"))
    await store.delete("acme", "sql", 2)
    for tenant, name, version in (("acme", "sql", 2), ("acme", "sql", 9), ("acme", "other", 1), ("globex", "sql", 1)):
        with pytest.raises(NotPublished):
            await store.set_speculation(tenant, name, version, OFF)
    with pytest.raises(InvalidName):
        await store.set_speculation("acme", "a}:b", 1, OFF)
    assert (await store.get("acme", "sql")).versions[0].speculation.enabled


# --- deleting ---


async def test_deleting_one_version_leaves_the_others(store: Store) -> None:
    first, second = [await publish(store, draft(text)) for text in "ab"]
    assert await store.delete("acme", "sql", 2) == [second]
    assert (await store.get("acme", "sql")).versions == (first,)
    for text in ("sql@2", f"sql@{second.digest}"):
        with pytest.raises(NotPublished):
            await resolve(store, text)
    with pytest.raises(NotPublished):
        await store.delete("acme", "sql", 2)


async def test_a_version_under_an_alias_stays(store: Store) -> None:
    for text in "ab":
        await publish(store, draft(text))
    await store.set_alias("acme", "sql", "prod", 1)
    with pytest.raises(InUse, match="prod"):
        await store.delete("acme", "sql", 1)
    assert await resolve(store, "sql") == 1
    await store.delete_alias("acme", "sql", "prod")
    assert [v.version for v in await store.delete("acme", "sql", 1)] == [1]


async def test_deleting_an_adapter_takes_versions_and_aliases(store: Store) -> None:
    for text in "ab":
        await publish(store, draft(text))
    await publish(store, draft("a", name="chat"))
    await store.set_alias("acme", "sql", "prod", 1)
    assert [v.version for v in await store.delete("acme", "sql")] == [2, 1]
    assert [summary.name for summary in await store.list("acme")] == ["chat"]
    for attempt in (store.get("acme", "sql"), store.delete("acme", "sql"), store.set_alias("acme", "sql", "x", 1)):
        with pytest.raises(NotPublished):
            await attempt
    await publish(store, draft("c"))
    assert (await store.get("acme", "sql")).aliases == {}


@pytest.mark.parametrize("version", [None, 2])
async def test_numbers_are_never_used_again(store: Store, version: int | None) -> None:
    for text in "ab":
        await publish(store, draft(text))
    await store.delete("acme", "sql", version)
    assert (await publish(store, draft("b"))).version == 3


# --- tenants ---


async def test_tenants_never_meet(store: Store) -> None:
    mine = await publish(store, draft("a"))
    await store.set_alias("acme", "sql", "prod", 1)
    _, key = new_key("acme")
    await store.put_key(key)
    await store.delete("acme", (await publish(store, draft("gone", name="old"))).name)

    assert await store.list("globex") == []
    assert await store.list_keys("globex") == []
    assert await store.begin_sweep("globex", 0) == []
    attempts: list[Callable[[str], Awaitable[object]]] = [
        lambda name: store.resolve("globex", parse_reference(name)),
        lambda name: store.resolve("globex", parse_reference(f"{name}@1")),
        lambda name: store.resolve("globex", parse_reference(f"{name}@prod")),
        lambda name: store.resolve("globex", parse_reference(f"{name}@{mine.digest}")),
        lambda name: store.resolve("globex", parse_reference(f"acme/{name}")),
        lambda name: store.get("globex", name),
        lambda name: store.delete("globex", name),
        lambda name: store.delete("globex", name, 1),
        lambda name: store.set_alias("globex", name, "prod", 1),
        lambda name: store.set_speculation("globex", name, 1, OFF),
        lambda name: store.delete_alias("globex", name, "prod"),
    ]
    for attempt in attempts:
        texts = []
        for name in ("sql", "nil"):  # one that the other tenant has, and one that nobody has
            with pytest.raises(NotPublished) as caught:
                await attempt(name)
            texts.append(str(caught.value).replace(name, "*"))
        assert texts[0] == texts[1]
        assert "acme" not in texts[0]
    with pytest.raises(NotPublished):
        await store.delete_key("globex", key.id)

    theirs = await publish(store, draft("a", tenant="globex"))
    assert (theirs.version, theirs.digest) == (1, mine.digest)
    await store.delete("globex", "sql")
    assert (await store.get("acme", "sql")).versions == (mine,)
    assert await store.find_key(key.sha256) == key


async def test_a_claim_is_only_good_for_its_tenant(store: Store) -> None:
    made = draft("a")
    await store.claim_blobs("globex", made.blob_sha256s)
    with pytest.raises(BlobMissing):
        await store.publish(made)


@pytest.mark.parametrize("bad", ["", "a}:{b", "a:b", "A", "x" * 64, "../x", "*"])
async def test_names_that_break_the_rules_reach_no_key(store: Store, bad: str) -> None:
    for attempt in (
        store.list(bad),
        store.get(bad, "sql"),
        store.get("acme", bad),
        store.delete("acme", bad),
        store.claim_blobs(bad, [sha("a")]),
        store.claim_blobs("acme", [bad]),
        store.begin_sweep(bad, 0),
        store.list_keys(bad),
        store.find_key(bad),
    ):
        with pytest.raises(InvalidName):
            await attempt
    assert await store.tenants() == []


async def test_the_index_knows_publishers_claimers_and_key_holders(store: Store) -> None:
    assert await store.tenants() == []
    await publish(store, draft("a", tenant="publisher"))
    await store.delete("publisher", "sql")
    await store.put_key(new_key("holder")[1])
    await store.claim_blobs("claimer", [sha("a")])
    assert await store.tenants() == ["claimer", "holder", "publisher"]


async def test_a_listing_is_sorted_and_complete(store: Store) -> None:
    names = [f"n{i:03}" for i in range(120)]  # more than one batch
    await asyncio.gather(*(publish(store, draft("a", name=name)) for name in reversed(names)))
    assert [summary.name for summary in await store.list("acme")] == names


# --- keys ---


async def test_a_key_is_found_by_the_hash_of_its_secret(store: Store) -> None:
    secret, key = new_key("acme", "laptop")
    await store.put_key(key)
    assert await store.find_key(hash_key(secret)) == key
    assert await store.find_key(hash_key(secret + "x")) is None


async def test_the_last_use_of_a_key_is_kept_as_long_as_the_key(store: Store) -> None:
    _, key = new_key("acme", role=Role.CALLER, models=("sql",), expires_at=utc_now())
    await store.put_key(key)
    assert await store.list_keys("acme") == [key]
    assert await store.key_uses("acme") == {}
    await store.note_key_use("acme", key.id)
    await store.note_key_use("acme", "key_unknown")
    uses = await store.key_uses("acme")
    assert set(uses) == {key.id}
    assert utc_now() - uses[key.id] < timedelta(minutes=2)
    await store.delete_key("acme", key.id)
    assert await store.key_uses("acme") == {}


async def test_keys_are_listed_oldest_first_and_revoked(store: Store) -> None:
    keys = [new_key("acme", f"{i}")[1] for i in range(3)]
    for key in reversed(keys):
        await store.put_key(key)
    assert await store.list_keys("acme") == keys
    await store.delete_key("acme", keys[1].id)
    assert await store.list_keys("acme") == [keys[0], keys[2]]
    assert await store.find_key(keys[1].sha256) is None
    with pytest.raises(NotPublished):
        await store.delete_key("acme", keys[1].id)


async def test_a_key_is_changed_only_while_it_is_there(store: Store) -> None:
    _, key = new_key("acme")
    ended = key.model_copy(update={"expires_at": utc_now(), "replaced_by": "key_2"})
    with pytest.raises(NotPublished):
        await store.replace_key(ended)
    await store.put_key(key)
    await store.replace_key(ended)
    assert await store.list_keys("acme") == [ended]
    assert await store.find_key(key.sha256) == ended
    await store.delete_key("acme", key.id)
    with pytest.raises(NotPublished):
        await store.replace_key(key)
    assert await store.find_key(key.sha256) is None


async def test_ping_answers(store: Store) -> None:
    await store.ping()
