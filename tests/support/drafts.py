"""Small adapter drafts for tests: the content is a text, so equal texts are equal digests."""

from __future__ import annotations

import hashlib

from adapter_registry.jobs import FILE_PREFIX, FileRecord, new_id
from adapter_registry.records import AdapterDraft, AdapterKind, AdapterVersion, FileEntry, utc_now
from adapter_registry.store import Store


def sha(content: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(content.encode()).hexdigest()


def entry(path: str, content: str) -> FileEntry:
    """A file with this content."""
    return FileEntry(path=path, size=len(content.encode()), sha256=sha(content))


def draft(
    content: str, *, tenant: str = "acme", name: str = "sql", shared: str = "config", attachment: str | None = None
) -> AdapterDraft:
    """An adapter of two files, of which the config is often shared between versions."""
    return AdapterDraft(
        tenant=tenant,
        name=name,
        kind=AdapterKind.LORA,
        base_model="base",
        rank=8,
        acceptance=(0.1, 0.7, 1 / 3),
        files=(entry("adapter_config.json", shared), entry("adapter_model.safetensors", content)),
        attachments=() if attachment is None else (entry("card.md", attachment),),
        warnings=("ünïcode ✓",),
    )


def rows(content: str, tenant: str = "acme") -> FileRecord:
    """A training file."""
    return FileRecord(
        id=new_id(FILE_PREFIX), tenant=tenant, filename="rows.jsonl", purpose="fine-tune", size=len(content),
        sha256=sha(content), created_at=utc_now(),
    )  # fmt: skip


async def publish(store: Store, made: AdapterDraft) -> AdapterVersion:
    """Claim and publish, as a publisher does."""
    await store.claim_blobs(made.tenant, made.blob_sha256s)
    version, _ = await store.publish(made)
    return version
