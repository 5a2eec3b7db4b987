"""From a folder of files to a published version: inspect, store the content, make it visible with one atomic step."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from adapter_registry.errors import RegistryError
from adapter_registry.records import (
    SHA256_PATTERN,
    AdapterDraft,
    AdapterVersion,
    VersionWish,
    canonical_manifest,
    check_name,
)
from adapter_registry.store import BlobStore, Store
from slipstream.adapters.validate import InspectedAdapter, inspect_adapter
from slipstream.protocol import BaseModelSpec

log = logging.getLogger("slipstream.publishing")
T = TypeVar("T")
_ADOPTED_AT_ONCE = 500
Check = Callable[[AdapterDraft], Awaitable[None]]


async def run_to_end(work: Callable[[], T]) -> T:
    """Run blocking work in the loop's executor. A thread cannot be cancelled, so cancellation waits for it to end:
    whoever cleans up afterwards must find nobody still at work on the same files."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def publish_folder(
    folder: Path,
    name: str,
    tenant: str,
    base: BaseModelSpec,
    *,
    store: Store,
    blobs: BlobStore,
    created_by: str,
    wish: VersionWish | None = None,
    check: Check | None = None,
) -> tuple[AdapterVersion, bool]:
    """Publish the adapter in `folder`; returns its version and whether it is new. Only a new one takes what `wish` says.

    `check` has the last word, when engines can fetch the files already. Raises `AdapterRejected` with the rule that they
    break. Nothing is visible before the last line; blobs that a
    failure or cancellation leaves behind are garbage of the registry's sweep.
    """
    check_name(name)
    check_name(tenant, "tenant")
    found = await run_to_end(lambda: inspect_adapter(folder, base))
    draft = _draft(found, name, tenant, created_by, wish or VersionWish())
    await store.claim_blobs(tenant, draft.blob_sha256s)
    for entry in (*draft.files, *draft.attachments):
        await blobs.put_file(tenant, entry.sha256, folder / entry.path)
    await blobs.put_bytes(tenant, draft.digest.removeprefix("sha256:"), canonical_manifest(draft.files))
    if check is not None:
        await check(draft)
    return await store.publish(draft)


async def sweep_blobs(store: Store, blobs: BlobStore, older_than_s: float) -> int:
    """Delete every tenant's blobs that nothing has referred to for `older_than_s`; returns how many.

    Several gateways may do this at once. What a sweep that fails half-way has marked, a later one takes over.
    """
    swept = 0
    for tenant in await store.tenants():
        while found := await store.begin_sweep(tenant, older_than_s):
            for sha256 in found:
                await blobs.delete(tenant, sha256)
            await store.end_sweep(tenant, found)
            swept += len(found)
    return swept


async def mend(store: Store, blobs: BlobStore) -> int:
    """Put right what no single step can see: blobs that the registry does not know become garbage for later sweeps, and each
    tenant's sum of stored bytes is counted anew. Returns how many such blobs there were; what fails for one tenant does not
    keep it from the others."""
    found = 0
    for tenant in await store.tenants():
        try:
            await store.mend_sizes(tenant)
            some: list[str] = []
            async for sha256 in blobs.list(tenant):
                if re.fullmatch(SHA256_PATTERN, sha256):  # a folder may hold other things, too
                    some.append(sha256)
                if len(some) == _ADOPTED_AT_ONCE:
                    found += await store.adopt_blobs(tenant, some)
                    some.clear()
            found += await store.adopt_blobs(tenant, some)
        except RegistryError as error:
            log.warning("looking for blobs of %s that nobody knows failed: %s", tenant, error)
    return found


@dataclass(slots=True)
class Sweeper:
    """What one gateway does against garbage; several may at once."""

    store: Store
    blobs: BlobStore
    older_than_s: float
    mend_every: int  # sweeps
    _sweeps: int = 0

    async def make(self) -> None:
        """Sweep; at first, and now and then, mend."""
        self._sweeps += 1
        if self._sweeps % self.mend_every == 1 % self.mend_every:
            log.info("%d blobs are not in the registry", await mend(self.store, self.blobs))
        log.info("swept %d blobs", await sweep_blobs(self.store, self.blobs, self.older_than_s))


def _draft(found: InspectedAdapter, name: str, tenant: str, created_by: str, wish: VersionWish) -> AdapterDraft:
    return AdapterDraft(
        tenant=tenant,
        name=name,
        kind=found.kind,
        base_model=found.base_model,
        base_digest=found.base_digest,
        rank=found.rank,
        num_streams=found.num_streams,
        acceptance=tuple(found.acceptance),
        prompt_format=found.prompt_format,
        files=found.files,
        attachments=found.attachments,
        warnings=tuple(found.warnings),
        created_by=created_by,
        **wish.model_dump(),
    )
