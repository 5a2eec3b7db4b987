"""Tensor-parallel engines for tests: rank 0 here, the others in processes that serve one engine after the other."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slipstream.engine.build import follow
from slipstream.engine.config import EngineConfig, FastPath
from slipstream.engine.loader import LoadedModel, eos_ids
from slipstream.engine.parallel.group import Group
from slipstream.engine.parallel.load import load_shard
from slipstream.engine.parallel.ranks import Follower, Lead, LeadRunner, Meeting
from slipstream.engine.runner import ModelRunner

HOST = "127.0.0.1"
CPU = torch.device("cpu")
DONE = b"done\n"


@dataclass(frozen=True)
class RankSpec:
    """What one rank of one engine is built from; `options` are `ModelRunner`'s."""

    folder: Path
    size: int
    rank: int
    meeting: Meeting
    dtype: str
    options: Mapping[str, Any]

    def follow(self) -> None:
        """The life of a rank from 1 on."""
        follower = Follower(self.meeting, self.rank, self.size, HOST)
        follower.follow(self.build(follower.meet(CPU))[1])

    def build(self, group: Group) -> tuple[LoadedModel, ModelRunner]:
        """This rank's part, and what runs it."""
        loaded = load_shard(str(self.folder), self.dtype, "cpu", group)
        options = {"num_blocks": 256, "block_size": 16, "disable": (FastPath.ADAPTIVE_DRAFTS,), **self.options}
        options.setdefault("eos_ids", eos_ids(loaded))
        return loaded, ModelRunner(loaded, **options)


@dataclass(frozen=True)
class ServiceSpec:
    """One rank from 1 on of a whole engine service."""

    config: EngineConfig
    size: int
    rank: int
    meeting: Meeting

    def follow(self) -> None:
        """Its life."""
        follow(self.config, Follower(self.meeting, self.rank, self.size, HOST))


@dataclass
class RankProcesses:
    """Processes for ranks from 1 on, started when first needed: torch takes seconds to import."""

    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @contextmanager
    def engine(
        self, folder: Path, size: int, dtype: str = "float32", **options: Any
    ) -> Iterator[tuple[LoadedModel, LeadRunner]]:
        """A model folder over `size` ranks; yields rank 0's part and the runner of all."""
        lead = Lead(HOST, size)
        specs = [RankSpec(folder, size, rank, lead.meeting, dtype, options) for rank in range(size)]
        with self._following(specs[1:]):
            try:
                loaded, runner = specs[0].build(lead.meet(CPU))
                yield loaded, LeadRunner(runner, lead)
            finally:
                lead.close()

    @contextmanager
    def service(self, config: EngineConfig, size: int) -> Iterator[Lead]:
        """The other ranks of a service, which is to close the lead that this yields."""
        lead = Lead(HOST, size)
        with self._following([ServiceSpec(config, size, rank, lead.meeting) for rank in range(1, size)]):
            yield lead

    @contextmanager
    def _following(self, specs: Sequence[RankSpec | ServiceSpec]) -> Iterator[None]:
        for spec in specs:
            process = self._process(spec.rank)
            assert process.stdin is not None
            pickle.dump(spec, process.stdin)
            process.stdin.flush()
        try:
            yield
        finally:
            for spec in specs:
                process = self._process(spec.rank)
                assert process.stdout is not None
                assert process.stdout.readline() == DONE

    def _process(self, rank: int) -> subprocess.Popen[bytes]:
        while len(self._processes) < rank:
            command = [sys.executable, "-m", "support.ranks"]
            tests = Path(__file__).parents[1]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tests))
        return self._processes[rank - 1]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            assert process.wait(30) == 0
            process.stdout.close()


def main() -> None:
    """Follow in one engine after the other; what they are comes on standard input."""
    torch.set_num_threads(1)
    while True:
        try:
            spec: RankSpec | ServiceSpec = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            spec.follow()
        finally:
            sys.stdout.buffer.write(DONE)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
