"""The round that every gateway makes every second: what is complete is put together, checked and published; what is to be
pulled is pulled; what nobody went on with is let go.

Nothing here holds state: imports are in the `ImportStore`. Who works on one has a lease that it renews; a gateway that dies
leaves one behind, and when that is over another begins anew. All that happens may happen twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from adapter_registry.errors import BlobCorrupt, BlobMissing, NotPublished, RegistryError, StorageFull, StoreUnavailable
from adapter_registry.imports import ImportEnded, ImportFault, ImportRecord, ImportStore, Lease, part_count
from adapter_registry.records import AdapterDraft, VersionState, utc_now
from adapter_registry.store import BlobStore, Store
from slipstream.errors import ClientError, InvalidRequest, Overloaded, SlipstreamError
from slipstream.importing.archives import unpacked
from slipstream.importing.smoke import smoke_test
from slipstream.importing.sources import Sources
from slipstream.protocol import BaseModelSpec, EngineClient
from slipstream.publishing import publish_folder, run_to_end

log = logging.getLogger("slipstream.importing")

LEASE_S = 30.0
MAX_ATTEMPTS = 5
ABANDONED_S = 24 * 3600.0  # an upload that nobody completes
AT_ONCE = 2  # imports that one gateway works on
LOOK_FOR_ABANDONED = 600  # rounds
T = TypeVar("T")


class LostLease(Exception):
    """Somebody else works on it, or it has ended."""


@dataclass(slots=True)
class ImportRounds:
    """One gateway's part in it. `make` is called by one task; what it starts goes on in others."""

    imports: ImportStore
    store: Store
    blobs: BlobStore
    sources: Sources
    base: Callable[[str | None], Awaitable[tuple[BaseModelSpec, EngineClient]]]
    scratch: Callable[[], AbstractAsyncContextManager[Path]]  # a folder that is gone afterwards
    max_bytes: int
    ended: Callable[[VersionState], None] = lambda state: None  # told of each import that has come to its end
    now: Callable[[], datetime] = utc_now
    lease_s: float = LEASE_S
    holder: str = field(default_factory=lambda: secrets.token_hex(8))
    _running: dict[str, tuple[str, asyncio.Task[None]]] = field(
        default_factory=dict
    )  # id → tenant, and who works on it
    _rounds: int = 0

    async def make(self) -> None:
        """Look at every import that there is something to do about, and now and then at the others."""
        if self._rounds % LOOK_FOR_ABANDONED == 0:
            await self._end_abandoned()
        self._rounds += 1
        due = [each for each in await self.imports.due() if each.id not in self._running and self._is_free(each)]
        while due and len(self._running) < AT_ONCE:
            # Tenants take turns: who has the fewest at work, and of its own the one that waits the longest.
            record = min(due, key=lambda each: (self._at_work(each.tenant), each.created_at))
            due.remove(record)
            task = asyncio.create_task(self._work(record))
            self._running[record.id] = (record.tenant, task)
            task.add_done_callback(lambda _, id_=record.id: self._running.pop(id_, None))  # type: ignore[misc]

    async def _end_abandoned(self) -> None:
        for record in await self.imports.open():
            if not record.is_due and self.now() - record.created_at > timedelta(seconds=ABANDONED_S):
                fault = ImportFault(code="upload_abandoned", message="It was not completed within a day. Begin anew.")
                await self.change(record, state=VersionState.REJECTED, fault=fault, smoke=())

    def _at_work(self, tenant: str) -> int:
        return sum(owner == tenant for owner, _ in self._running.values())

    async def settled(self) -> None:
        """Wait until nothing is at work."""
        while self._running:
            await asyncio.wait([task for _, task in self._running.values()])
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Stop. Another gateway goes on when the leases are over."""
        running = [task for _, task in self._running.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _is_free(self, record: ImportRecord) -> bool:
        return record.lease is None or record.lease.until <= self.now()

    async def _work(self, record: ImportRecord) -> None:
        try:
            if record.attempts >= MAX_ATTEMPTS:  # whoever worked on it died each time
                fault = ImportFault(code="import_failed", message=f"It failed {MAX_ATTEMPTS} times. Begin anew.")
                await self.change(record, state=VersionState.REJECTED, fault=fault, lease=None, smoke=())
                return
            taken = await self.change(record, lease=self.lease(), attempts=record.attempts + 1)
            await _Work(self, taken).run()
        except (LostLease, ImportEnded, NotPublished):
            log.info("import %s is not ours any more", record.id)
        except StoreUnavailable as error:
            log.warning("import %s: %s", record.id, error)  # the lease ends, and somebody begins anew
        except Exception:  # a task's top: nobody else would hear of it
            log.exception("import %s failed", record.id)

    async def change(self, record: ImportRecord, **changes: object) -> ImportRecord:
        """Change it, as long as this attempt is the last. Raises `LostLease`."""

        def if_ours(found: ImportRecord) -> ImportRecord:
            if found.lease is not None and found.lease.holder != self.holder and not self._is_free(found):
                raise LostLease
            if found.attempts != record.attempts:
                raise LostLease
            return found.changed(**changes)

        changed = await self.imports.update(record.tenant, record.id, if_ours)
        if changed.state in (VersionState.READY, VersionState.REJECTED):
            self.ended(changed.state)
        return changed

    def lease(self) -> Lease:
        """From now on."""
        return Lease(holder=self.holder, until=self.now() + timedelta(seconds=self.lease_s))


@dataclass(slots=True)
class _Work:
    """One attempt at one import."""

    rounds: ImportRounds
    record: ImportRecord
    received: int = 0

    async def run(self) -> None:
        """To its end, or to the end of this attempt."""
        try:
            version, is_new = await self._beating(self._publish())
        except StorageFull as error:
            await self._reject("storage_quota_exceeded", str(error))
        except Overloaded as error:
            await self._later(error)
        except ClientError as error:  # `AdapterRejected` among them
            await self._reject(error.code, str(error), error.param)
        except (BlobMissing, BlobCorrupt):
            await self._reject("incomplete_upload", "Parts of the files are not here any more. Upload them again.")
        except (LostLease, ImportEnded, NotPublished):
            raise
        except Exception as error:  # whatever it is: it may pass, and if it does not there is an end to it
            await self._later(error)
        else:
            await self._end(state=VersionState.READY, version=version, is_new=is_new)

    async def _publish(self) -> tuple[str, bool]:
        record, rounds = self.record, self.rounds
        spec, engine = await rounds.base(record.base)
        async with rounds.scratch() as folder:
            wish = record.wish
            if record.source:
                exact = await rounds.sources.fetch(record.source, folder, rounds.max_bytes, self._note)
                wish = wish.model_copy(update={"lineage": wish.lineage.model_copy(update={"source": exact})})
                self.record = await rounds.change(self.record, state=VersionState.VALIDATING)
            else:
                await self._put_together(folder)
            flat = await run_to_end(lambda: unpacked(folder, rounds.max_bytes))

            async def check(draft: AdapterDraft) -> None:
                await smoke_test(engine, spec, draft, record.smoke)

            version, is_new = await publish_folder(
                flat, record.name, record.tenant, spec, store=rounds.store, blobs=rounds.blobs,
                created_by=record.created_by, wish=wish, check=check,
            )  # fmt: skip
            return version.ref, is_new

    async def _put_together(self, folder: Path) -> None:
        """The files of an upload, out of their parts."""
        record, blobs = self.record, self.rounds.blobs
        parts = await self.rounds.imports.parts(record.tenant, record.id)
        for entry in record.files:
            part = folder / f".{entry.path[:200]}.part"
            with (folder / entry.path).open("xb") as whole:
                for index in range(part_count(entry.size)):
                    sha = parts.get((entry.path, index))
                    if sha is None:
                        raise BlobMissing(f"{entry.path} lacks its part {index}.")
                    await blobs.fetch_file(record.tenant, sha, part)
                    await run_to_end(partial(_append, part, whole))
                    part.unlink()
            await run_to_end(partial(_check_hash, folder / entry.path, entry.sha256))

    async def _beating(self, work: Awaitable[T]) -> T:
        """Wait for `work`, renewing the lease: it may take longer."""
        running = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({running}, timeout=self.rounds.lease_s / 3))[0]:
                try:
                    self.record = await self.rounds.change(
                        self.record, lease=self.rounds.lease(), received_bytes=self.received
                    )
                except StoreUnavailable:
                    if self.record.lease is None or self.record.lease.until <= self.rounds.now():
                        raise
            return running.result()
        finally:
            running.cancel()
            await asyncio.wait({running})

    def _note(self, received: int) -> None:
        self.received = received

    async def _later(self, error: Exception) -> None:
        log.warning("import %s, attempt %d: %s: %s", self.record.id, self.record.attempts, type(error).__name__, error)
        if self.record.attempts >= MAX_ATTEMPTS:
            known = isinstance(error, SlipstreamError | RegistryError)
            code = getattr(error, "code", "import_failed") if known else "import_failed"
            last = f", at last with: {error}" if known else ""
            await self._reject(code, f"It failed {MAX_ATTEMPTS} times{last}. Begin anew.")
        else:
            await self.rounds.change(self.record, lease=self.rounds.lease())  # until then it rests

    async def _reject(self, code: str, message: str, param: str | None = None) -> None:
        await self._end(state=VersionState.REJECTED, fault=ImportFault(code=code, message=message, param=param))

    async def _end(self, **changes: object) -> None:
        await self.rounds.change(self.record, lease=None, received_bytes=self.received, smoke=(), **changes)


def _append(part: Path, whole: BinaryIO) -> None:
    with part.open("rb") as file:
        shutil.copyfileobj(file, whole)


def _check_hash(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InvalidRequest(
            f"{path.name} has the sha256 {found}, not {sha256} as was said. Upload it again.",
            code="checksum_mismatch",
            param="files",
        )
