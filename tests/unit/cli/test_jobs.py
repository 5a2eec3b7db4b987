"""`slipstream jobs …` against the application itself, in this process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from support.api_app import BASE, ApiWorld
from typer.testing import CliRunner, Result

from adapter_registry.jobs import JobError, JobState
from slipstream.cli import app


class Shell:
    """Runs commands with a key in the environment."""

    def __init__(self, folder: Path) -> None:
        self.world = ApiWorld(folder / "uploads")
        self.key = asyncio.run(self.world.key())
        self.rows = folder / "train.jsonl"
        self.rows.write_text('{"prompt": "1+1=", "completion": "2"}\n')

    def __call__(self, *arguments: str) -> Result:
        environment = {"SLIPSTREAM_URL": "http://test", "SLIPSTREAM_API_KEY": self.key, "COLUMNS": "200"}
        transport = httpx.ASGITransport(self.world.app)
        result = CliRunner().invoke(app, ["jobs", *arguments], env=environment, obj=transport)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    def create(self, *more: str) -> dict[str, object]:
        words = ["create", "--name", "sql", "--base", BASE, "--data", str(self.rows), "--json", *more]
        done = self(*words)
        assert done.exit_code == 0, done.output
        job: dict[str, object] = json.loads(done.stdout)
        return job


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_create_list_show_events_cancel(shell: Shell) -> None:
    assert "No jobs yet" in shell("list").stdout
    words = ("create", "--name", "sql", "--base", BASE, "--data", str(shell.rows), "--valid", str(shell.rows))
    created = shell(*words, "--option", "epochs=2", "--option", "prompt_format=raw")
    assert created.exit_code == 0, created.output
    job_id = created.stdout.split()[1].rstrip(".")
    assert job_id in shell("list").stdout
    shown = shell("show", job_id).stdout
    for expected in ("queued", "epochs: 2", "prompt_format: raw", "method: turbo_lora", "validation_file: file-"):
        assert expected in shown
    assert "The job is queued" in shell("events", job_id).stdout
    assert shell("cancel", job_id).stdout == "Cancelled.\n"
    refused = shell("cancel", job_id)
    assert refused.exit_code == 1
    assert "cancelled" in refused.output


def test_json_for_scripts(shell: Shell) -> None:
    job_id = str(shell.create("--method", "lora")["id"])
    assert json.loads(shell("show", job_id, "--json").stdout)["slipstream"]["method"] == "lora"
    assert [job["id"] for job in json.loads(shell("list", "--json").stdout)] == [job_id]
    assert json.loads(shell("events", job_id, "--json").stdout)[0]["level"] == "info"
    assert json.loads(shell("cancel", job_id, "--json").stdout)["status"] == "cancelled"


def test_a_failed_job_says_why(shell: Shell) -> None:
    job_id = str(shell.create()["id"])
    error = JobError(code="invalid_training_file", message="training_file.jsonl, row 17: is not JSON.")
    asyncio.run(shell.world.jobs.update_job("demo", job_id, lambda job: job.moved(JobState.FAILED, error=error)))
    assert "row 17" in shell("list").stdout
    assert "row 17" in shell("show", job_id).stdout


def test_refusals(shell: Shell) -> None:
    words = ("create", "--name", "sql", "--base", BASE, "--data")
    assert "epochs=3" in shell(*words, str(shell.rows), "--option", "epochs").output
    assert "streems" in shell(*words, str(shell.rows), "--option", "streems=1").output
    assert shell(*words, "/nonexistent").exit_code == 1
    assert shell("show", "ftjob-x").exit_code == 1
