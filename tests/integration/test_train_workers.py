"""Two workers train what one would: through Ray Train, through the command line, and with the model sharded between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
import torch
from safetensors.torch import load_file
from support.processes import command, descendants, eventually
from support.tiny_model import save_tiny_model
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from deployments.train_workers import STOP, fit_on_ray
from slipstream.errors import InvalidRequest, Unavailable
from slipstream.training import phase
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.data import IGNORE, Encoded
from slipstream.training.events import CheckpointSaved, Event, Metrics
from slipstream.training.model import TurboModel
from slipstream.training.phase import PhaseJob, PhaseOutcome, fit_here, read_outcome, run_phase
from slipstream.training.sharding import shard_frozen

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(ROOT / "tests")])
ROWS, HELD_OUT, LONGEST = 26, 5, 40  # 26: the last step of an epoch is a short one
PROMPT = 4
CLOSE = 1e-5

pytestmark = [
    # The machine may be busy, and every worker imports torch and transformers.
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning"),  # Ray's, of itself
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # transformers 5.23
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray that runs already: what `fit_on_ray` uses when there is one."""
    with tempfile.TemporaryDirectory(prefix="slip-ray-", ignore_cleanup_errors=True) as scratch:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            log_to_driver=False,
            _temp_dir=scratch,
            _node_ip_address="127.0.0.1",
            _system_config={"worker_niceness": 0},
            runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}},
        )
        try:
            yield
        finally:
            ray.shutdown()


def rows(count: int, seed: int) -> list[Encoded]:
    """Random tokens in rows of random lengths; the first few of a row are its prompt."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(12, LONGEST, (count,), generator=generator).tolist():
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [IGNORE] * PROMPT + ids[PROMPT:]))
    return found


def job(base: Path, folder: Path, **options: Any) -> PhaseJob:
    """A run of a few steps, the same whatever it runs on: no dropout and no random negatives."""
    fields: dict[str, Any] = {
        "method": Method.TURBO_LORA,
        "epochs": 2,
        "batch_size": 8,
        "micro_batch_size": 2,
        "lora_rank": 2,
        "streams": 2,
        "stream_rank": 4,
        "negatives": None,
        "gate": 0.3,
        "eval_every": 3,
        "save_every": 3,
        "bf16": False,
        "device": "cpu",
        "threads": 1,
        **options,
    }
    config = TrainingConfig(base=str(base), data=folder / "rows.jsonl", output=folder, **fields)
    (folder / "phase").mkdir(parents=True)
    return PhaseJob(config, base, rows(ROWS, 0), rows(HELD_OUT, 1), 256, folder / "phase")


def nobody(event: Event) -> None:
    """Watches, and says nothing."""


def assert_same(one: PhaseJob, several: PhaseJob) -> None:
    """The losses of every step and evaluation, the tokens seen, and the weights at the end."""
    expected, found = read_outcome(one.folder), read_outcome(several.folder)
    assert expected is not None
    assert found is not None
    assert (found.steps, found.tokens) == (expected.steps, expected.tokens)
    assert curves(found) == [pytest.approx(row, rel=1e-4) for row in curves(expected)]
    assert sum("eval_loss" in row for row in found.history) == 2
    mine, theirs = (load_file(each.folder / "trainable.safetensors") for each in (several, one))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], atol=CLOSE, rtol=1e-4)


def curves(outcome: PhaseOutcome) -> list[dict[str, float]]:
    """What does not depend on how fast it ran."""
    kinds = ("loss", "top1", "gate", "learning_rate", "expected_tokens", "step")
    return [{k: v for k, v in row.items() if k != "train_loss" and k.endswith(kinds)} for row in outcome.history]


# --- without Ray: two processes with torch.distributed, as Ray Train sets it up -----------------------------------------


def work(rank: int, jobs: list[PhaseJob], rendezvous: Path, stop_at: int | None) -> None:
    """One of two workers."""
    os.environ.update(
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    )
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    steps = 0

    def second_worker_stops() -> bool:
        nonlocal steps
        steps += 1
        return rank == 1 and steps == stop_at

    with patch.object(phase, "shard_frozen", shard_and_look):
        for each in jobs:
            outcome = run_phase(each, nobody, 2, should_stop=second_worker_stops)
            assert outcome.stopped == (stop_at is not None)
    distributed.destroy_process_group()


def shard_and_look(model: TurboModel, device: torch.device) -> None:
    """Of every frozen weight half is here."""
    shard_frozen(model, device)
    frozen = [p for p in model.causal.get_decoder().parameters() if not p.requires_grad]
    assert frozen
    assert all(isinstance(p, DTensor) and p.to_local().numel() <= p.numel() // 2 + p.shape[-1] for p in frozen)


def on_two(jobs: list[PhaseJob], folder: Path, stop_at: int | None = None) -> None:
    """Run them on two workers."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        spawn(work, (jobs, Path(scratch) / "meet", stop_at), nprocs=2)  # type: ignore[no-untyped-call]


def test_a_sharded_model_learns_the_same(base: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "joint": {},
        "frozen": {"method": Method.TURBO},
        "checkpointed": {"gradient_checkpointing": True},
    }
    one = {name: job(base, tmp_path / name, **options) for name, options in kinds.items()}
    two = {name: job(base, tmp_path / f"{name}-two", fsdp=True, **options) for name, options in kinds.items()}
    # Not sharded, each worker keeps the states of the rows that it has seen.
    one["kept"] = one["frozen"]
    two["kept"] = job(base, tmp_path / "kept-two", method=Method.TURBO)
    for each in one.values():
        fit_here(each, nobody)  # once: what has ended is not run again
    on_two(list(two.values()), tmp_path)
    for name, each in one.items():
        assert_same(each, two[name])


def test_one_workers_stop_stops_all_and_they_resume_together(base: Path, tmp_path: Path) -> None:
    one, two = job(base, tmp_path / "one"), job(base, tmp_path / "two", resume=True)
    fit_here(one, nobody)
    on_two([two], tmp_path, stop_at=2)
    assert read_outcome(two.folder) is None
    assert [p.name for p in (two.folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    on_two([two], tmp_path)
    assert_same(one, two)


def test_workers_agree_on_a_time_limit(base: Path, tmp_path: Path) -> None:
    """Each has a clock of its own: steps and schedules by them would differ, and the first to stop would hang the other."""
    two = job(base, tmp_path / "two", epochs=1000, max_minutes=2 / 60, eval_every=1000, save_every=1000)
    on_two([two], tmp_path)
    done = read_outcome(two.folder)
    assert done is not None
    assert 0 < done.steps < 1000 * ROWS // 8


def test_fsdp_wants_workers(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="workers 2 or more"):
        fit_here(job(base, tmp_path, fsdp=True), nobody)


# --- with Ray ---------------------------------------------------------------------------------------------------------


def ray_workers() -> list[int]:
    """Process ids of Ray Train's workers below this process."""
    return [pid for pid in descendants(os.getpid()) if "RayTrainWorker" in command(pid)]


@pytest.mark.ray
def test_ray_workers_learn_the_same(cluster: None, base: Path, tmp_path: Path) -> None:
    one, two = job(base, tmp_path / "one"), job(base, tmp_path / "two", workers=2)
    fit_here(one, nobody)
    events: list[Event] = []

    def keep(event: Event) -> None:
        events.append(event)

    outcome = fit_on_ray(two.config)(two, keep)
    assert_same(one, two)
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [3, 6]
    told = [e.step for e in events if isinstance(e, Metrics) and "train/loss" in e.data]
    assert told == list(range(1, outcome.steps + 1))
    assert fit_on_ray(two.config)(two, nobody) == outcome  # ended before: not run again


@pytest.mark.ray
def test_a_dead_worker_ends_the_run(cluster: None, base: Path, tmp_path: Path) -> None:
    two = job(base, tmp_path, workers=2, epochs=1000, save_every=1000, eval_every=1000)

    def kill_at_the_second_step(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 2:
            os.kill(max(ray_workers()), signal.SIGKILL)

    with pytest.raises(Unavailable, match=r"^Worker \d(, \d)? failed, .*workers\.log has the details"):
        fit_on_ray(two.config)(two, kill_at_the_second_step)
    assert (two.folder / "workers.log").read_text()
    eventually(lambda: not ray_workers())
    assert read_outcome(two.folder) is None


@pytest.mark.ray
def test_sigterm_saves_a_checkpoint_and_stops(cluster: None, base: Path, tmp_path: Path) -> None:
    two = job(base, tmp_path, workers=2, epochs=1000, save_every=1000, eval_every=1000)
    saved: list[Event] = []

    def watch(event: Event) -> None:
        if isinstance(event, Metrics) and event.step == 2:
            signal.raise_signal(signal.SIGTERM)
        if isinstance(event, CheckpointSaved):
            saved.append(event)

    assert threading.current_thread() is threading.main_thread()
    outcome = fit_on_ray(two.config)(two, watch)
    assert outcome.stopped
    assert [Path(e.path).name for e in saved if isinstance(e, CheckpointSaved)] == [f"checkpoint-{outcome.steps}"]
    assert (two.folder / STOP).exists()


@pytest.mark.ray
def test_too_few_rows_to_go_round(base: Path, tmp_path: Path) -> None:
    few = job(base, tmp_path, workers=9)
    with pytest.raises(InvalidRequest, match="only 8 rows to share out"):
        fit_on_ray(few.config)(few, nobody)


@pytest.mark.ray
def test_the_command_line(base: Path, tmp_path: Path) -> None:
    """Two phases, each with a Ray of its own, and paths from where the command was given."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}+1=", "completion": "{n + 1}"}}\n' for n in range(16)))
    options = {
        "data": data.name, "base": base, "output": "run", "distill-rows": 4, "workers": 2,
        "threads": 1, "epochs": 1, "batch-size": 4,
        "lora-rank": 2, "streams": 2, "stream-rank": 4, "gate-rows": 0, "device": "cpu",
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from deployments.main import main; main()",
            "train",
            *flags,
            "--no-bf16",
            "--self-distill",
            "--json",
        ],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["steps"] == 4 + 6  # the second phase: six passes over four rows
    assert (tmp_path / told["folder"] / "adapter_model.safetensors").is_file()
