"""Names, references and digests."""

from __future__ import annotations

import hashlib
import json
import math
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.drafts import draft, entry, sha

from adapter_registry.errors import InvalidName
from adapter_registry.records import (
    NAME_PATTERN,
    AdapterSummary,
    AdapterVersion,
    FileEntry,
    VersionSelector,
    VersionState,
    canonical_manifest,
    check_alias,
    check_name,
    check_sha256,
    manifest_digest,
    parse_reference,
    utc_now,
)

NAME_CHARS = string.ascii_lowercase + string.digits + "._-"
names = st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: not name.endswith("\n"))
aliases = names.filter(lambda name: not name.isdigit())
hexes = st.text("0123456789abcdef", min_size=64, max_size=64)
# Text that is nearly a reference finds more than text at random.
almost = st.text(NAME_CHARS + "@/:AZ \n\x00٣é\ud800", max_size=90) | st.builds(
    "{}@sha256:{}".format, names, st.text("0123456789abcdefg\n", min_size=62, max_size=66)
)
files = st.lists(
    st.builds(
        FileEntry,
        path=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True),
        size=st.integers(0, 2**40),
        sha256=hexes,
    ),
    unique_by=lambda file: file.path,
    max_size=6,
)


@pytest.mark.parametrize(
    ("text", "selector"),
    [
        ("sql", VersionSelector(name="sql")),
        ("sql@3", VersionSelector(name="sql", by="version", version=3)),
        ("sql@prod", VersionSelector(name="sql", by="alias", alias="prod")),
        ("sql@3b", VersionSelector(name="sql", by="alias", alias="3b")),
        ("acme/sql", VersionSelector(tenant="acme", name="sql")),
        ("acme/sql@12", VersionSelector(tenant="acme", name="sql", by="version", version=12)),
        ("7.b_c-d", VersionSelector(name="7.b_c-d")),
        (f"s@sha256:{'a' * 64}", VersionSelector(name="s", by="digest", digest=f"sha256:{'a' * 64}")),
    ],
)
def test_what_references_mean(text: str, selector: VersionSelector) -> None:
    assert parse_reference(text) == selector


@pytest.mark.parametrize(
    "text",
    [
        *("", "@", "/", "@1", "/sql", "acme/", "acme//sql", "a/b/c", "sql@", "sql@0", "sql@01", "sql@1@2", "sql@-1"),
        *("Sql", "sql\n", " sql", "-sql", ".sql", "..", "s" * 64, "sql@1000000000", "sql@٣", "é", "sql@Prod"),
        *("sql@sha256:", f"sql@sha256:{'A' * 64}", f"sql@sha256:{'a' * 63}", f"sql@sha256:{'a' * 64}\n", "a@b/c@d"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidName):
        parse_reference(text)


@given(st.text() | almost)
def test_parsing_says_invalid_name_or_a_selector_that_is_legal(text: str) -> None:
    try:
        selector = parse_reference(text)
    except InvalidName:
        return
    check_name(selector.name)
    filled = [value for value in (selector.version, selector.alias, selector.digest) if value is not None]
    assert len(filled) == (0 if selector.by == "default" else 1)


@given(st.none() | names, names, st.none() | st.integers(1, 10**9 - 1) | aliases | st.builds("sha256:{}".format, hexes))
def test_a_reference_round_trips(tenant: str | None, name: str, tag: int | str | None) -> None:
    selector = parse_reference((f"{tenant}/" if tenant else "") + name + ("" if tag is None else f"@{tag}"))
    assert (selector.tenant, selector.name) == (tenant, name)
    assert (selector.version or selector.alias or selector.digest) == tag
    expected = "default" if tag is None else "version" if isinstance(tag, int) else "digest" if ":" in tag else "alias"
    assert selector.by == expected


@given(st.text(NAME_CHARS + "A\n@/ ", max_size=70))
def test_names_and_aliases_follow_one_rule(text: str) -> None:
    legal = re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", text) is not None
    for check, allowed in ((check_name, legal), (check_alias, legal and not text.isdigit())):
        if allowed:
            assert check(text) == text
        else:
            with pytest.raises(InvalidName):
                check(text)


@pytest.mark.parametrize("bad", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"])
def test_what_is_no_sha256(bad: str) -> None:
    with pytest.raises(InvalidName):
        check_sha256(bad)


@given(files, st.randoms(use_true_random=False))
def test_a_digest_does_not_depend_on_order(entries: list[FileEntry], random: object) -> None:
    shuffled = sorted(entries, key=lambda _: random.random())  # type: ignore[attr-defined]  # a random.Random
    assert manifest_digest(shuffled) == manifest_digest(entries)


@given(files)
def test_a_manifest_is_the_json_its_digest_is_of(entries: list[FileEntry]) -> None:
    manifest = canonical_manifest(entries)
    assert [FileEntry.model_validate(row) for row in json.loads(manifest)] == sorted(entries, key=lambda f: f.path)
    assert manifest_digest(entries) == "sha256:" + hashlib.sha256(manifest).hexdigest()


def test_a_digest_is_pinned_for_ever() -> None:
    # Changing the canonical form would rename every published adapter.
    assert canonical_manifest([entry("b", "2"), entry("a", "1")]) == (
        b'[{"path":"a","sha256":"%b","size":1},{"path":"b","sha256":"%b","size":1}]'
        % (sha("1").encode(), sha("2").encode())
    )


@pytest.mark.parametrize("change", [{"path": "other"}, {"size": 2}, {"sha256": "0" * 64}])
def test_a_digest_depends_on_all_of_a_file(change: dict[str, object]) -> None:
    file = entry("a", "1")
    assert manifest_digest([file.model_copy(update=change)]) != manifest_digest([file])


def test_attachments_and_words_do_not_change_the_digest() -> None:
    plain, dressed = draft("a"), draft("a", attachment="card")
    assert plain.digest == dressed.digest == plain.model_copy(update={"warnings": ()}).digest
    assert draft("b").digest != plain.digest
    assert plain.size_bytes == dressed.size_bytes == len("a") + len("config")


def test_the_blobs_of_a_version_are_its_files_attachments_and_manifest() -> None:
    made = draft("a", attachment="a")  # one content twice
    manifest = hashlib.sha256(canonical_manifest(made.files)).hexdigest()
    assert made.blob_sha256s == tuple(sorted({sha("a"), sha("config"), manifest}))


@pytest.mark.parametrize("path", ["", "../x", "a/b", "/a", ".hidden", "-x", "a\n", "a\x00", "x" * 256, "ä"])
def test_file_names_are_flat_and_plain(path: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(path=path, size=1, sha256="0" * 64)


def version(number: int, state: VersionState = VersionState.READY) -> AdapterVersion:
    made = draft(str(number)).model_dump()
    return AdapterVersion.model_validate({**made, "version": number, "state": state, "created_at": utc_now()})


def test_a_version_round_trips_through_json() -> None:
    made = version(3)
    assert AdapterVersion.model_validate_json(made.model_dump_json()) == made
    assert made.ref == "sql@3"


def test_a_long_input_is_not_thrown_back_at_people() -> None:
    with pytest.raises(InvalidName) as caught:
        parse_reference("x" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_json_has_not_are_refused(number: float) -> None:
    with pytest.raises(ValidationError):
        draft("a").model_validate({**draft("a").model_dump(), "acceptance": (number,)})


@pytest.mark.parametrize(
    ("states", "aliases_set", "current"),
    [
        ({1: "ready", 2: "ready"}, {}, 2),
        ({1: "ready", 2: "validating"}, {}, 1),
        ({1: "ready", 2: "rejected", 3: "registered"}, {"canary": 2}, 1),
        ({1: "ready", 2: "ready"}, {"prod": 1}, 1),
        ({1: "rejected", 2: "ready"}, {"prod": 1}, None),
        ({1: "validating"}, {}, None),
    ],
)
def test_what_a_plain_name_is(states: dict[int, str], aliases_set: dict[str, int], current: int | None) -> None:
    versions = tuple(version(number, VersionState(state)) for number, state in sorted(states.items(), reverse=True))
    summary = AdapterSummary(tenant="acme", name="sql", versions=versions, aliases=aliases_set)
    assert (summary.current.version if summary.current else None) == current
