"""The SDK against the running application: uploads, training with a scripted trainer, prompts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.api_app import BASE, ApiWorld
from support.http_server import serving_app
from support.local_jobs import LocalJobRunner

import slipstream
from slipstream import FinetuningConfig, Slipstream
from slipstream import errors as tree
from slipstream.client.sdk_types import FinetuningFailed
from slipstream.testing import FakeAnswer

ROWS = '{"prompt": "1+1=", "completion": "2"}\n' * 16


@pytest.fixture
def world(tmp_path: Path) -> ApiWorld:
    made = ApiWorld(tmp_path / "uploads")
    made.rebuild(job_runner=LocalJobRunner(made, tmp_path), jobs_every_s=0.02)
    return made


@pytest.fixture
def client(world: ApiWorld) -> Iterator[Slipstream]:
    key = asyncio.run(world.key())
    with serving_app(world.app) as url, Slipstream(api_key=key, url=url, poll_s=0.05) as made:
        yield made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "sql.jsonl"
    path.write_text(ROWS)
    return path


CONFIG = FinetuningConfig(base_model=BASE, adapter="turbo_lora", epochs=2, rank=8, learning_rate=1e-3, streams=3)


def test_from_rows_to_answers(client: Slipstream, world: ApiWorld, rows: Path, tmp_path: Path) -> None:
    dataset = client.datasets.from_file(rows)
    assert (dataset.name, dataset.size_bytes) == ("sql.jsonl", len(ROWS))
    assert client.datasets.get("sql") == client.datasets.get("sql.jsonl") == client.datasets.get(dataset.id) == dataset
    repo = client.repos.create(name="good", description="SQL", exists_ok=True)
    adapter = client.adapters.create(config=CONFIG, dataset=dataset, repo=repo, description="first")
    assert (adapter.repo, adapter.tag, adapter.reference) == ("good", 1, "good@1")
    assert (adapter.base_model, adapter.kind, adapter.prompt_format, adapter.speculation) == (BASE, "lora", "raw", True)
    assert client.adapters.get("good/1") == client.adapters.get("good") == adapter
    assert client.adapters.list("good") == [adapter]
    assert client.repos.get("good").versions == (1,)

    folder = client.adapters.download("good/1", tmp_path / "downloaded")
    assert (folder / "adapter_model.safetensors").is_file()

    world.engine.enqueue("SELECT one FROM two")
    answer = client.deployments.client(BASE).generate("question", adapter_id="good/1", max_new_tokens=9, temperature=0)
    assert answer.generated_text == "SELECT one FROM two"
    assert (answer.completion_tokens, answer.finish_reason) == (4, "stop")
    assert answer.tokens_per_step == pytest.approx(4 / 3)
    request = world.engine.requests[-1]
    assert (request.text, request.params.max_tokens, request.params.temperature) == ("question", 9, 0)
    assert request.adapter is not None

    client.adapters.delete("good/1")
    with pytest.raises(tree.NotFound):
        client.adapters.get("good/1")
    client.datasets.delete(dataset)
    assert client.datasets.list() == []


def test_the_jobs_body_is_what_was_configured(client: Slipstream, rows: Path) -> None:
    config = CONFIG.model_copy(update={"stream_rank": "dense", "seed": 5, "options": {"gate": 0.5}})
    dataset = client.datasets.from_file(rows, name="mine")
    assert dataset.name == "mine.jsonl"
    job_id = client.adapters.start(config, "mine", "good", "why", validation=dataset)
    job = client.send("GET", f"/v1/fine_tuning/jobs/{job_id}").json()
    sent = {name: job["slipstream"][name] for name in ("method", "epochs", "lora_rank", "streams", "gate")}
    assert sent == {"method": "turbo_lora", "epochs": 2, "lora_rank": 8, "streams": 3, "gate": 0.5}
    assert (job["slipstream"]["stream_rank"], job["slipstream"]["conditioned"]) == (None, False)
    assert (job["seed"], job["validation_file"], job["metadata"]) == (5, dataset.id, {"description": "why"})
    client.adapters.wait(job_id)


def test_making_an_adapter_faster(client: Slipstream, rows: Path) -> None:
    first = client.adapters.create(CONFIG, client.datasets.from_file(rows), "good", show_progress=False)
    turbo = FinetuningConfig(base_model=BASE, adapter="turbo")
    job_id = client.adapters.start(turbo, "sql", "slow", continue_from_version=f"{first.repo}/{first.tag}")
    job = client.send("GET", f"/v1/fine_tuning/jobs/{job_id}").json()
    assert job["slipstream"]["adapter"] == "good@1"
    faster = client.adapters.wait(job_id, show_progress=False)
    assert (faster.speculation, faster.speculation_reason) == (False, "Expected speed-up 1.02.")


def test_metrics_are_shown(client: Slipstream, rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client.adapters.create(CONFIG, client.datasets.from_file(rows), "good")
    told = capfd.readouterr().err
    assert [line for line in told.splitlines() if line.startswith("Step ")] == [
        "Step 1/3: train/loss=1",
        "Step 2/3: train/loss=0.5",
        "Step 3/3: train/loss=0.3333",
    ]
    assert told.splitlines()[-1] == "Published good@1."
    client.adapters.create(CONFIG, "sql", "good", show_progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("repo", "code", "says"), [("oom", "out_of_memory", "memory"), ("killed", "worker_killed", "was killed")]
)
def test_a_failed_job_raises_its_reason(client: Slipstream, rows: Path, repo: str, code: str, says: str) -> None:
    with pytest.raises(FinetuningFailed, match=says) as caught:
        client.adapters.create(CONFIG, client.datasets.from_file(rows), repo, show_progress=False)
    assert caught.value.code == code
    assert caught.value.job["status"] == "failed"
    with pytest.raises(tree.NotFound):
        client.repos.get(repo)


def test_a_bad_row_is_named(client: Slipstream, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(ROWS + '{"prompt": "1+1="}\n')
    with pytest.raises(FinetuningFailed, match="row 17"):
        client.adapters.create(CONFIG, client.datasets.from_file(path), "bad-row", show_progress=False)


def test_a_cancelled_job_raises(client: Slipstream, rows: Path) -> None:
    job_id = client.adapters.start(CONFIG, client.datasets.from_file(rows), "hang")

    def cancel() -> None:
        while client.send("GET", f"/v1/fine_tuning/jobs/{job_id}").json()["status"] != "running":
            time.sleep(0.02)
        client.send("POST", f"/v1/fine_tuning/jobs/{job_id}/cancel")

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(FinetuningFailed, match="cancelled"):
        client.adapters.wait(job_id, show_progress=False)
    thread.join()


def test_answers_come_piece_by_piece(client: Slipstream, world: ApiWorld) -> None:
    base = client.deployments.client(BASE)
    for chat in (False, True):
        world.engine.enqueue("one two three")
        pieces = list(base.generate_stream("count", max_new_tokens=8, apply_chat_template=chat))
        assert "".join(piece.text for piece in pieces) == pieces[-1].generated_text == "one two three"
        assert all(piece.generated_text is None for piece in pieces[:-1])
        assert pieces[-1].whole is not None
        assert pieces[-1].whole.completion_tokens == 3
    assert world.engine.requests[-1].messages is not None
    world.engine.enqueue("hello there")
    assert base.generate("hi", apply_chat_template=True).generated_text == "hello there"
    world.engine.enqueue(FakeAnswer(("a", " b", " c"), fail_after=1))
    with pytest.raises(tree.ServerError):
        list(base.generate_stream("count"))
    with pytest.raises(tree.NotFound):
        list(base.generate_stream("count", adapter_id="nobody/1"))


def test_repos_are_names(client: Slipstream, rows: Path) -> None:
    with pytest.raises(tree.InvalidRequest, match="not a valid"):
        client.repos.create(name="No Name")
    with pytest.raises(tree.NotFound):
        client.repos.get("good")
    assert client.repos.create(name="good").versions == ()
    client.adapters.create(CONFIG, client.datasets.from_file(rows), "good", show_progress=False)
    with pytest.raises(tree.Conflict, match="exists_ok"):
        client.repos.create(name="good")
    assert client.repos.create(name="good", exists_ok=True).versions == (1,)


def test_what_is_not_there(client: Slipstream, tmp_path: Path) -> None:
    for ask in (client.datasets.get, client.adapters.get, client.adapters.delete):
        with pytest.raises(tree.NotFound):
            ask("nothing")
    with pytest.raises(tree.InvalidRequest, match="cannot be read"):
        client.datasets.from_file(tmp_path / "nothing.jsonl")


def test_address_and_key_come_from_the_environment(client: Slipstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_URL", client._url)
    monkeypatch.setenv("SLIPSTREAM_API_KEY", client._key)
    with Slipstream() as other:
        assert other.datasets.list() == []
    monkeypatch.delenv("SLIPSTREAM_API_KEY")
    with pytest.raises(tree.InvalidRequest, match="SLIPSTREAM_API_KEY"):
        Slipstream()
    with Slipstream("sk-slip-wrong", client._url) as stranger, pytest.raises(tree.Unauthorized):
        stranger.datasets.list()
    with Slipstream("key", "http://127.0.0.1:9") as nobody, pytest.raises(tree.Unavailable, match="Cannot reach"):
        nobody.datasets.list()


def test_importing_the_package_stays_light() -> None:
    code = "import sys, slipstream; print([m for m in ('httpx', 'torch', 'pydantic') if m in sys.modules])"
    folder = Path(slipstream.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    sdk = "import sys; from slipstream import Slipstream; print('torch' in sys.modules)"
    paths = f"import sys; sys.path.insert(0, {str(folder.parent)!r}); "
    done = subprocess.run([sys.executable, "-c", paths + sdk], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
