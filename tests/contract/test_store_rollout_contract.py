"""One suite for every `Store`: shadows, guards that roll back, and what becomes of the requests of watched aliases."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.drafts import draft, publish

from adapter_registry.changes import Change, ChangeFeed
from adapter_registry.errors import InUse
from adapter_registry.records import Guard, Outcome, Split, Watch, parse_reference
from adapter_registry.store import Store

WATCH = Watch(tenant="acme", name="sql", alias="prod")
PROD = parse_reference("sql@prod")
FAILING = Guard(max_error_rate=0.1, min_requests=20)


async def three(store: Store) -> None:
    for letter in "abc":
        await publish(store, draft(letter))


async def tell(store: Store, number: int, outcome: Outcome, told_id: str | None = None) -> str:
    return await store.note_outcome(WATCH, number, outcome, told_id or secrets.token_hex(8))


async def version(store: Store) -> int:
    return (await store.resolve("acme", PROD)).version


async def test_a_shadow_answers_nobody(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.25, shadow=True))
    for point, shadow in ((0.0, 2), (0.2499, 2), (0.25, None), (0.9, None), (None, None)):
        for reference in ("sql", "sql@prod"):
            route = await store.route("acme", parse_reference(reference), point)
            assert route.version.version == 1
            assert (route.shadow.version if route.shadow else None) == shadow
            assert route.watch == WATCH
    with pytest.raises(InUse):
        await store.delete("acme", "sql", 2)
    assert (await store.get("acme", "sql")).splits["prod"].shadow
    assert await store.roll_back_alias("acme", "sql", "prod") == 1
    assert (await store.route("acme", PROD, 0.0)).watch is None


async def test_only_aliases_with_a_split_or_a_guard_are_watched(store: Store) -> None:
    await three(store)
    assert (await store.route("acme", parse_reference("sql"), 0.0)).watch is None
    await store.set_alias("acme", "sql", "prod", 1)
    assert (await store.route("acme", PROD, 0.0)).watch is None
    await store.set_alias("acme", "sql", "prod", 1, guard=FAILING)
    assert (await store.route("acme", PROD)).watch == WATCH
    assert (await store.route("acme", parse_reference("sql@1"))).watch is None
    assert (await store.get("acme", "sql")).guards == {"prod": FAILING}
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5))
    assert (await store.route("acme", PROD, 0.9)).watch == WATCH
    assert (await store.get("acme", "sql")).guards == {}


async def test_a_split_that_fails_is_taken_back(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5), guard=FAILING)
    assert await tell(store, 1, Outcome(requests=100, errors=100)) == "", "the old one is not judged"
    assert await tell(store, 2, Outcome(requests=19, errors=19)) == "", "too few to judge"
    assert await store.outcomes("acme", "sql") == {
        ("prod", 1): Outcome(requests=100, errors=100), ("prod", 2): Outcome(requests=19, errors=19),
    }  # fmt: skip
    assert await tell(store, 2, Outcome(requests=171)) == ""  # 19 of 190: as many as may
    assert await tell(store, 2, Outcome(requests=2, errors=2)) == "21 of 192 requests failed"
    summary = await store.get("acme", "sql")
    assert (summary.aliases, summary.splits, summary.guards) == ({"prod": 1}, {}, {})
    assert await store.outcomes("acme", "sql") == {}
    last = (await store.alias_moves("acme", "sql"))[0]
    assert (last.by, last.version, last.reason) == ("guard", 1, "21 of 192 requests failed")
    entry = (await store.audit_log("acme", 1))[0]
    assert (entry.by, entry.detail) == ("guard", "1 to 1: 21 of 192 requests failed")
    assert await tell(store, 2, Outcome(requests=100, errors=100)) == ""
    assert await version(store) == 1


async def test_a_whole_move_that_drafts_badly_goes_back(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1)
    await store.set_alias("acme", "sql", "prod", 2, guard=Guard(min_acceptance=0.5, min_requests=1))
    assert await tell(store, 2, Outcome(requests=5)) == "", "nothing was drafted"
    assert await tell(store, 2, Outcome(requests=5, drafted_tokens=10, accepted_tokens=5)) == ""
    reason = await tell(store, 2, Outcome(requests=1, drafted_tokens=10, accepted_tokens=1))
    assert reason == "6 of 20 drafted tokens were accepted"
    assert await version(store) == 1


async def test_what_is_told_twice_counts_once(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5), guard=FAILING)
    for _ in range(30):
        assert await tell(store, 2, Outcome(requests=1, errors=1), "the same") == ""
    assert (await store.outcomes("acme", "sql"))["prod", 2].requests == 1
    assert await version(store) == 1


async def test_an_alias_that_nobody_watches_counts_nothing(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1)
    assert await tell(store, 1, Outcome(requests=9)) == ""
    assert await store.outcomes("acme", "sql") == {}


async def test_replicas_hear_of_a_rollback(store: Store, changes: ChangeFeed) -> None:
    await three(store)
    one, two = [(await store.resolve("acme", parse_reference(f"sql@{n}"))).digest for n in (1, 2)]
    await store.set_alias("acme", "sql", "prod", 1)
    for split in (Split(version=2, weight=0.5), None):
        await store.set_alias("acme", "sql", "prod", 1 if split else 2, split=split, guard=FAILING)
        place = await changes.now()
        assert await tell(store, 2, Outcome(requests=30, errors=30)) != ""
        heard, _ = await changes.listen(place, 0.05)
        assert list(heard) == [Change(tenant="acme", coming=one, instead_of=two)]


async def test_there_may_be_nowhere_to_go(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 3, guard=FAILING)  # it is new
    assert await tell(store, 3, Outcome(requests=100, errors=100)) == ""
    assert await version(store) == 3
    await store.set_alias("acme", "sql", "prod", 1)
    await store.set_alias("acme", "sql", "prod", 2, guard=FAILING)
    await store.delete("acme", "sql", 1)
    assert await tell(store, 2, Outcome(requests=100, errors=100)) == ""
    assert await version(store) == 2


async def test_many_gateways_roll_back_once(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1)
    await store.set_alias("acme", "sql", "prod", 2)
    await store.set_alias("acme", "sql", "prod", 3, guard=FAILING)
    told = await asyncio.gather(*(tell(store, 3, Outcome(requests=20, errors=20)) for _ in range(10)))
    assert sorted(map(bool, told)) == [False] * 9 + [True]
    assert await version(store) == 2


async def test_what_was_long_ago_does_not_count(store: Store) -> None:
    await three(store)
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5), guard=FAILING)
    short = Guard(max_error_rate=0.1, min_requests=20, window_s=10)
    await store.set_alias("acme", "sql", "prod", 1, split=Split(version=2, weight=0.5), guard=short)
    await tell(store, 2, Outcome(requests=19, errors=19))
    await asyncio.sleep(10.1)
    assert await tell(store, 2, Outcome(requests=19, errors=19)) == ""
    assert (await store.outcomes("acme", "sql"))["prod", 2].requests == 19


counts = st.integers(0, 60)


@given(
    guard=st.builds(
        Guard,
        max_error_rate=st.none() | st.sampled_from([0.0, 0.1, 0.5]),
        min_acceptance=st.none() | st.sampled_from([0.3, 0.9]),
        min_requests=st.integers(1, 60),
    ),
    outcome=st.builds(Outcome, requests=counts, errors=counts, drafted_tokens=counts, accepted_tokens=counts),
)
def test_a_breach_has_a_reason_and_enough_requests(guard: Guard, outcome: Outcome) -> None:
    reason = outcome.breach(guard)
    if outcome.requests < guard.min_requests or guard.max_error_rate is guard.min_acceptance is None:
        assert reason == ""
    elif guard.max_error_rate is not None and outcome.errors > guard.max_error_rate * outcome.requests:
        assert "failed" in reason
