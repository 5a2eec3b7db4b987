"""Training as a process: the command line, and the worker that jobs start, with its events and its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.training import QUICK, counting_rows, save_sharp_model, write_jsonl
from typer.testing import CliRunner, Result

from slipstream.cli import app
from slipstream.training import run, worker
from slipstream.training.model import TRAINABLE

WORKER = [sys.executable, "-m", "slipstream.training.worker"]


class Job:
    """A worker's folder: its configuration, its events, and its output."""

    def __init__(self, folder: Path, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.output = folder / "output"
        self.base = folder.parent / "tiny"
        if not self.base.exists():
            save_sharp_model(self.base, layers=2)
        self.data = write_jsonl(folder / "train.jsonl", counting_rows(24))
        fields = {"base": self.base, "data": self.data, "output": self.output, **QUICK, **options}
        self.configure(**fields)

    def configure(self, **fields: Any) -> None:
        self.fields = fields
        (self.folder / "config.json").write_text(json.dumps(fields, default=str))

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.folder / worker.EVENTS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def main(self) -> int:
        """In this process."""
        return worker.main(self.folder / "config.json")

    def start(self) -> subprocess.Popen[bytes]:
        """In a process of its own."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [*WORKER, str(self.folder / "config.json")], env=environment, stdout=log, stderr=log
            )

    def nothing_is_left_to_publish(self) -> None:
        assert not (self.output / "adapter").exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "job")


def test_a_worker_tells_everything_in_its_events(job: Job) -> None:
    assert job.main() == 0
    kinds = [event["type"] for event in job.events]
    assert kinds[-1] == "result"
    assert {"phase", "metrics", "checkpoint", "message"} <= set(kinds)
    result = job.events[-1]
    assert Path(result["folder"]) == job.output / "adapter"
    assert (job.output / "adapter" / "adapter_model.safetensors").is_file()
    assert (result["steps"], set(result["gate"])) == (6, {"speculation", "reason", "expected_speedup"})
    assert [e["step"] for e in job.events if e["type"] == "metrics" and "train/loss" in e["data"]] == list(range(1, 7))


def test_bad_data_at_row_17(job: Job) -> None:
    lines = job.data.read_text().splitlines()
    lines[16] = '{"prompt": "a"}'
    job.data.write_text("\n".join(lines))
    assert job.main() == 1
    assert job.events[-1] == {
        "type": "error",
        "code": "invalid_training_file",
        "message": "train.jsonl, row 17: cannot be used: 'completion' is missing. Mend or remove the row.",
        "param": "data",
    }
    job.nothing_is_left_to_publish()


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"epochs": 0}, "epochs", "greater than or equal to 1"),
        ({"colour": "red"}, "colour", "not permitted"),
        ({"batch_size": 4, "micro_batch_size": 3}, None, "multiple of micro_batch_size 3"),
        ({"adapter": "/some/where"}, None, "goes with turbo or medusa"),
        ({"stream_rank": None, "conditioned": True}, None, "cannot be conditioned"),
    ],
)
def test_a_bad_configuration(job: Job, changes: dict[str, Any], param: str | None, words: str) -> None:
    job.configure(**{**job.fields, **changes})
    assert job.main() == 1
    (event,) = job.events
    assert (event["type"], event["code"], event["param"]) == ("error", "bad_config", param)
    assert words in event["message"]
    job.nothing_is_left_to_publish()


def test_a_base_model_that_is_not_there(job: Job) -> None:
    job.configure(**{**job.fields, "base": str(job.folder / "nowhere")})
    assert job.main() == 1
    assert job.events[-1]["type"] == "error"
    assert "nowhere" in job.events[-1]["message"]
    job.nothing_is_left_to_publish()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."), "out_of_memory"),
        (RuntimeError("shapes (3, 4) and (5, 6)"), "training_failed"),
    ],
    ids=["python", "torch", "other"],
)  # fmt: skip
def test_what_fails_while_training(
    job: Job, error: Exception, code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(run._Run, "_train", fail)
    assert job.main() == 1
    event = job.events[-1]
    assert (event["type"], event["code"]) == ("error", code)
    assert "shapes" not in event["message"], "internals go to the log"
    assert ("shapes" in capsys.readouterr().err) == (code == "training_failed")
    job.nothing_is_left_to_publish()


def wait_for_step(job: Job, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(e["type"] == "metrics" and e["step"] >= step for e in job.events):
        assert process.poll() is None, (job.folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(600)
def test_sigterm_saves_and_resuming_finishes_the_same_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 12, "lora_dropout": 0.2, "save_every": 1000, "eval_every": 1000}
    whole, job = Job(tmp_path / "whole", **options), Job(tmp_path / "job", **options)
    assert whole.main() == 0

    process = job.start()
    try:
        wait_for_step(job, process, 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == worker.STOPPED
    finally:
        process.kill()
        process.wait()
    (saved,) = [event for event in job.events if event["type"] == "checkpoint"]
    assert 3 <= saved["step"] < 72
    assert (Path(saved["path"]) / TRAINABLE).is_file()
    assert job.events[-1]["type"] not in ("result", "error")
    job.nothing_is_left_to_publish()

    job.configure(**{**job.fields, "resume": True})
    assert job.main() == 0
    assert job.events[-1]["steps"] == 72
    steps = [e["step"] for e in job.events if e["type"] == "metrics" and "train/loss" in e["data"]]
    assert steps == list(range(1, 73))
    ends = [load_file(j.output / "phase" / TRAINABLE) for j in (whole, job)]
    assert ends[0].keys() == ends[1].keys()
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


# --- the command line ---------------------------------------------------------------------------------------------


def command(job: Job, *arguments: object, name: str = "train") -> Result:
    line = [name, "--data", str(job.data), "--base", str(job.base), "--output", str(job.output),
            "--batch-size", "4", "--epochs", "1", "--streams", "2", "--stream-rank", "4", "--no-bf16", "--device", "cpu",
            "--max-length", "64", "--gate-rows", "0", *map(str, arguments)]  # fmt: skip
    result = CliRunner().invoke(app, line, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "Traceback" not in result.output
    return result


def test_a_run_from_the_command_line(job: Job) -> None:
    valid = write_jsonl(job.folder / "valid.jsonl", counting_rows(6, first=30))
    options = ("--valid", valid, "--eval-every", 3)
    done = command(job, *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == f"Adapter: {job.output / 'adapter'}"
    assert "Speculation: on. Not measured" in done.stdout
    assert "tokens/step" in done.stderr
    assert (job.output / "adapter" / "training_card.md").read_text().startswith("# output: turbo_lora")
    again = command(job, *options)
    assert again.exit_code == 1
    assert "holds a run already. Resume it, or give another folder." in again.stderr
    other = command(job, "--resume")
    assert other.exit_code == 1
    assert "holds a run with another eval_every. Resume it as it was" in other.stderr
    resumed = command(job, *options, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert json.loads(resumed.stdout)["steps"] == 6


def test_a_finished_lora_is_made_fast(job: Job, tmp_path: Path) -> None:
    assert command(job, "--method", "lora").exit_code == 0
    lora = job.output / "adapter"
    fast = Job(tmp_path / "fast")
    done = command(fast, lora, name="turbo")
    assert done.exit_code == 0, done.output
    assert "Answering the training prompts" in done.stderr
    made = fast.output / "adapter"
    assert (made / "turbo_streams.safetensors").is_file()
    assert (made / "adapter_model.safetensors").read_bytes() == (lora / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "--epochs: Input should be greater than or equal to 1"),
        (["--stream-rank", "much"], "--stream-rank: "),
        (["--batch-size", "4", "--micro-batch-size", "3"], "must be a multiple of micro_batch_size 3"),
        (["--adapter", "."], "an existing adapter goes with turbo or medusa"),
        (["--method", "turbo", "--lora-targets", "a"], None),
    ],
)
def test_options_that_make_no_sense(job: Job, arguments: list[str], words: str | None) -> None:
    result = command(job, *arguments)
    if words is None:
        assert result.exit_code == 0, "what a method does not use does no harm"
        return
    assert result.exit_code == 1
    assert words in result.stderr
    assert not job.output.exists()


def test_running_out_of_memory_is_told_without_a_traceback(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes.")

    monkeypatch.setattr(run._Run, "_train", fail)
    result = command(job)
    assert result.exit_code == 1
    assert "ran out of memory. Give a smaller micro_batch_size" in result.stderr
    job.nothing_is_left_to_publish()


def test_bad_rows_are_told_without_a_traceback(job: Job) -> None:
    job.data.write_text('{"prompt": "a", "completion": "b"}\noops\n')
    result = command(job)
    assert result.exit_code == 1
    assert "train.jsonl, row 2: is not JSON" in result.stderr
    job.nothing_is_left_to_publish()
