"""Records: frozen, validated, JSON in and out. Identity is content (architecture.md, decision 7)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from adapter_registry.errors import InvalidName

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
DIGEST_PATTERN = r"^sha256:[0-9a-f]{64}$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]


class VersionState(StrEnum):
    """Where a version stands; only READY resolves."""

    REGISTERED = "registered"  # named, its files are still coming
    VALIDATING = "validating"  # all files are here and being checked
    READY = "ready"  # visible and immutable
    REJECTED = "rejected"  # refused; the reason is in the record


class AdapterKind(StrEnum):
    """What the files hold."""

    LORA = "lora"
    TURBO_LORA = "turbo_lora"
    TURBO = "turbo"  # streams without a LoRA
    MEDUSA = "medusa"  # streams with LM heads of their own, with or without a LoRA


class PromptFormat(StrEnum):
    """How prompts reach the adapter."""

    RAW = "raw"
    CHAT = "chat"


class Frozen(BaseModel):
    """Base of every record."""

    # NaN has no JSON: a record that holds one could be written but never read again.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileEntry(Frozen):
    """One file of a version; the content is the blob `sha256` of the tenant."""

    path: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,254}$")]  # flat: no folders
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class SpeculationPolicy(Frozen):
    """What `"speculation": "auto"` means for a version. Mutable, and no part of its digest."""

    enabled: bool = True
    reason: Annotated[str, Field(max_length=500)] = ""  # why it is off (or on again), for people


def canonical_manifest(files: Iterable[FileEntry]) -> bytes:
    """Canonical JSON of the sorted `{path, size, sha256}`; its sha256 is the adapter's digest."""
    rows = sorted((f.model_dump() for f in files), key=lambda row: str(row["path"]))
    return json.dumps(rows, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def manifest_digest(files: Iterable[FileEntry]) -> str:
    """`sha256:<hex>` over `canonical_manifest`."""
    return "sha256:" + hashlib.sha256(canonical_manifest(files)).hexdigest()


Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(max_length=256)]
Labels = Annotated[dict[Label, LabelValue], Field(max_length=32)]


class Lineage(Frozen):
    """Where a version comes from, as far as it is known. Immutable, and no part of its digest."""

    training_job: Annotated[str, Field(max_length=100)] = ""  # id
    parent: Annotated[str, Field(max_length=200)] = ""  # adapter it was trained on from: `name@3`, or a digest
    data_sha256: Sha256 | None = None  # of its training rows
    source: Annotated[str, Field(max_length=500)] = ""  # URL that it was pulled from
    evaluation: Annotated[dict[Label, float], Field(max_length=64)] = Field(default_factory=dict)  # held-out measures


class VersionWish(Frozen):
    """What a publisher says of a new version beside its files."""

    speculation: SpeculationPolicy = SpeculationPolicy()  # `Store.set_speculation` changes it later
    labels: Labels = Field(default_factory=dict)  # `Store.set_labels` likewise
    lineage: Lineage = Lineage()


class AdapterDraft(VersionWish):
    """What a publisher hands over: a version before the registry has numbered it."""

    tenant: Name
    name: Name
    kind: AdapterKind
    base_model: str
    base_digest: Digest | None = None
    rank: int = 0  # largest LoRA rank; 0 without a LoRA
    num_streams: int = 0
    acceptance: tuple[float, ...] = ()  # conditional, by position, as measured at training time
    prompt_format: PromptFormat = PromptFormat.RAW
    files: tuple[FileEntry, ...]  # config and tensors: these make the digest
    attachments: tuple[FileEntry, ...] = ()  # cards, curves, pictures: these do not
    warnings: tuple[str, ...] = ()
    created_by: str = ""  # key id

    @property
    def digest(self) -> str:
        """The identity of the content."""
        return manifest_digest(self.files)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that make the digest."""
        return sum(f.size for f in self.files)

    @property
    def blob_sizes(self) -> dict[str, int]:
        """Bytes of every blob that the version refers to, by sha256: its files, its attachments and the manifest itself."""
        named = {f.sha256: f.size for f in (*self.files, *self.attachments)}
        return named | {self.digest.removeprefix("sha256:"): len(canonical_manifest(self.files))}

    @property
    def blob_sha256s(self) -> tuple[str, ...]:
        """Every blob that the version refers to."""
        return tuple(sorted(self.blob_sizes))


class AdapterVersion(AdapterDraft):
    """One version as the registry keeps it: immutable, all but its speculation policy and its labels."""

    version: Annotated[int, Field(ge=1)]
    state: VersionState
    created_at: datetime

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


class Access(Frozen):
    """Who may call an adapter beside its own tenant, as `tenant/name`."""

    public: bool = False
    tenants: Annotated[tuple[Name, ...], Field(max_length=100)] = ()

    def allows(self, tenant: str) -> bool:
        """Whether another tenant may call it."""
        return self.public or tenant in self.tenants


class Split(Frozen):
    """A part of an alias's requests that another version answers."""

    version: Annotated[int, Field(ge=1)]
    weight: Annotated[
        float, Field(ge=0.0001, le=0.9999), AfterValidator(lambda part: round(part, 6))
    ]  # of its requests
    shadow: bool = False  # it answers them as well, and nobody sees what


class Guard(Frozen):
    """When an alias rolls back by itself: its newest version (the split's, if there is one) fails or drafts too badly."""

    max_error_rate: Annotated[float, Field(ge=0, lt=1)] | None = None  # of its requests
    min_acceptance: Annotated[float, Field(gt=0, le=1)] | None = None  # of its drafted tokens
    min_requests: Annotated[int, Field(ge=1, le=10**6)] = 50  # before it is judged
    window_s: Annotated[int, Field(ge=10, le=86_400)] = 600  # about as long counts a request


class Outcome(Frozen):
    """What became of requests of one version of an alias, in about the last window of its guard."""

    requests: Annotated[int, Field(ge=0)] = 0
    errors: Annotated[int, Field(ge=0)] = 0  # of the server's or the version's making
    drafted_tokens: Annotated[int, Field(ge=0)] = 0  # that the version's own streams proposed and the model decided …
    accepted_tokens: Annotated[int, Field(ge=0)] = 0  # … the same way
    compared: Annotated[int, Field(ge=0)] = 0  # shadows whose answer could be compared with what the caller got …
    same: Annotated[int, Field(ge=0)] = 0  # … and was the same text

    def plus(self, other: Outcome) -> Outcome:
        """Both together."""
        return Outcome(**{name: getattr(self, name) + getattr(other, name) for name in Outcome.model_fields})

    def breach(self, guard: Guard) -> str:
        """Why the guard rolls back, or "". `lua/note_outcome.lua` says the same."""
        if self.requests < guard.min_requests:
            return ""
        failing, drafted = self.errors / self.requests, max(1, self.drafted_tokens)
        if guard.max_error_rate is not None and failing > guard.max_error_rate:
            return f"{self.errors} of {self.requests} requests failed"
        if (
            guard.min_acceptance is not None
            and self.drafted_tokens
            and self.accepted_tokens / drafted < guard.min_acceptance
        ):
            return f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens were accepted"
        return ""


class AliasMove(Frozen):
    """What became of an alias."""

    alias: Name
    version: int | None = None  # None = it was removed
    before: int | None = None  # None = it was new
    split: Split | None = None  # from then on
    guard: Guard | None = None  # from then on
    reason: str = ""  # of a guard
    by: str = ""  # key id
    at: datetime


class Watch(Frozen):
    """An alias whose requests' outcomes are counted."""

    tenant: Name  # whose it is
    name: Name
    alias: Name


class Route(Frozen):
    """What a reference means for one request."""

    version: AdapterVersion  # answers it
    watch: Watch | None = None  # the alias that led there, if it has a split or a guard
    shadow: AdapterVersion | None = None  # answers it as well, and nobody sees what


class AuditAction(StrEnum):
    """What is written down."""

    VERSION_PUBLISHED = "version.published"
    VERSION_DELETED = "version.deleted"
    ALIAS_MOVED = "alias.moved"
    ACCESS_CHANGED = "access.changed"
    KEY_CREATED = "key.created"
    KEY_CHANGED = "key.changed"
    KEY_REVOKED = "key.revoked"
    USER_CHANGED = "user.changed"
    USER_REMOVED = "user.removed"
    TENANT_CHANGED = "tenant.changed"


class AuditEntry(Frozen):
    """Who did what, in a tenant; written by the step that did it, and never changed."""

    id: str  # in order of time
    at: datetime
    by: str  # key id; "admin" = the platform's
    action: AuditAction
    subject: str  # `name@version`, `name@alias`, an adapter, a key's id or a tenant
    detail: str = ""


class AdapterSummary(Frozen):
    """One line of a listing: an adapter and what its plain name resolves to."""

    tenant: Name
    name: Name
    versions: tuple[AdapterVersion, ...]  # newest first
    aliases: dict[str, int]
    splits: dict[str, Split] = Field(default_factory=dict)  # of aliases that have one
    guards: dict[str, Guard] = Field(default_factory=dict)  # likewise
    access: Access = Access()

    @property
    def current(self) -> AdapterVersion | None:
        """What the plain name resolves to: alias `prod` if set, else the newest READY version."""
        ready = [v for v in self.versions if v.state is VersionState.READY]
        pinned = self.aliases.get("prod")
        return next((v for v in ready if pinned is None or v.version == pinned), None)


class VersionSelector(Frozen):
    """A parsed reference: `name`, `name@3`, `name@alias` or `name@sha256:…`, perhaps behind `tenant/`."""

    tenant: Name | None = None
    name: Name
    by: Literal["default", "version", "alias", "digest"] = "default"
    version: int | None = None
    alias: str | None = None
    digest: str | None = None


def parse_reference(text: str) -> VersionSelector:
    """Parse what a client puts into `model`. Raises `InvalidName` with the rule that is broken."""
    owner, _, rest = text.rpartition("/")
    name, at, tag = rest.partition("@")
    check_name(name)
    if owner or text.startswith("/"):
        check_name(owner, "tenant")
    base = {"tenant": owner or None, "name": name}
    if not at:
        return VersionSelector.model_validate(base)
    if re.fullmatch(r"[1-9][0-9]{0,8}", tag):
        return VersionSelector.model_validate({**base, "by": "version", "version": int(tag)})
    if re.fullmatch(DIGEST_PATTERN, tag):
        return VersionSelector.model_validate({**base, "by": "digest", "digest": tag})
    check_alias(tag)
    return VersionSelector.model_validate({**base, "by": "alias", "alias": tag})


def check_name(name: str, what: str = "adapter name") -> str:
    """Return `name` if it is a legal one, else raise `InvalidName`."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidName(
            f"{name[:80]!r} is not a valid {what}: use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "starting with a letter or digit."
        )
    return name


def check_alias(alias: str) -> str:
    """Aliases are names that are not all digits (those are version numbers)."""
    check_name(alias, "version or alias")
    if alias.isdigit():
        raise InvalidName(f"{alias!r} is all digits, which names a version, so it cannot be an alias.")
    return alias


def check_sha256(sha256: str) -> str:
    """Return `sha256` if it is one in lower-case hex, else raise `InvalidName`: it becomes part of keys and paths."""
    if not re.fullmatch(SHA256_PATTERN, sha256):
        raise InvalidName(f"{sha256[:80]!r} is not a sha256: use 64 lower-case hex digits.")
    return sha256


def check_audit_id(text: str) -> str:
    """Return `text` if it is an entry's id, else raise `InvalidName`."""
    if not re.fullmatch(r"[0-9]{1,15}-[0-9]{1,15}", text):
        raise InvalidName(f"{text[:80]!r} is not the id of an entry.")
    return text


def utc_now() -> datetime:
    """The current time, with its zone."""
    return datetime.now(UTC)
