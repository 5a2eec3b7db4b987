"""Settings: where they come from, which wins, and what a person is told when one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from slipstream.adapters.rejection import rules_table
from slipstream.config import DEFAULT_MODEL, ModelDefaults, Settings, load_settings, settings_table, variable_name
from slipstream.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable_name(field), raising=False)
    monkeypatch.delenv("SLIPSTREAM_CONFIG", raising=False)
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "slipstream.yaml"
    path.write_text(text)
    return path


def test_defaults_serve_one_small_model_on_loopback(tmp_path: Path) -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.home) == ("127.0.0.1", 8000, tmp_path)
    assert [(m.base_model, m.dtype, m.id) for m in settings.models] == [(DEFAULT_MODEL, "auto", None)]


def test_the_caller_beats_the_variable_which_beats_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yaml(tmp_path, "port: 1111\nmax_waiting: 3\nmax_num_seqs: 9\n")
    assert load_settings().port == 1111
    monkeypatch.setenv("PORT", "2222")
    monkeypatch.setenv("SLIPSTREAM_MAX_WAITING", "5")
    settings = load_settings()
    assert (settings.port, settings.max_waiting, settings.max_num_seqs) == (2222, 5, 9)
    assert load_settings(port=3333).port == 3333


def test_the_number_of_replicas_is_fixed_unless_a_most_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def replicas() -> tuple[int, int, bool]:
        (model,) = load_settings().models
        return model.min_replicas, model.most_replicas, model.autoscales

    assert replicas() == (1, 1, False)
    monkeypatch.setenv("SLIPSTREAM_MIN_REPLICAS", "3")
    assert replicas() == (3, 3, False)
    monkeypatch.setenv("SLIPSTREAM_MAX_REPLICAS", "5")
    assert replicas() == (3, 5, True)
    monkeypatch.setenv("SLIPSTREAM_MIN_REPLICAS", "0")
    monkeypatch.delenv("SLIPSTREAM_MAX_REPLICAS")
    assert replicas() == (0, 1, True)


def test_fewer_at_most_than_at_least_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_MIN_REPLICAS", "3")
    monkeypatch.setenv("SLIPSTREAM_MAX_REPLICAS", "2")
    with pytest.raises(
        ConfigError, match=r"SLIPSTREAM_MAX_REPLICAS.*wrong \(got '2'\): it is below min_replicas, which is 3"
    ):
        load_settings()


def test_fewer_gateways_at_most_than_at_least_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_GATEWAY_REPLICAS", "3")
    monkeypatch.setenv("SLIPSTREAM_MAX_GATEWAY_REPLICAS", "2")
    with pytest.raises(ConfigError, match=r"SLIPSTREAM_MAX_GATEWAY_REPLICAS.*below gateway_replicas, which is 3"):
        load_settings()


def test_config_variable_names_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "elsewhere.yaml"
    other.write_text("dtype: float32\n")
    monkeypatch.setenv("SLIPSTREAM_CONFIG", str(other))
    assert load_settings().dtype == "float32"


def test_an_empty_file_and_an_empty_variable_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yaml(tmp_path, "")
    monkeypatch.setenv("SLIPSTREAM_REDIS_URL", "")
    assert load_settings().redis_url is None


def test_flat_settings_are_defaults_for_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_yaml(tmp_path, "models:\n  - {id: a, base_model: /models/a}\n  - {id: b, dtype: float16}\n")
    monkeypatch.setenv("SLIPSTREAM_DTYPE", "float32")
    models = load_settings().models
    assert [(m.id, m.base_model, m.dtype) for m in models] == [
        ("a", "/models/a", "float32"),
        ("b", DEFAULT_MODEL, "float16"),
    ]


def test_models_come_from_a_variable_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_MODELS", json.dumps([{"id": "x", "base_model": "owner/x"}]))
    assert [model.slug for model in load_settings().models] == ["x"]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PORT", "http", "PORT"),
        ("PORT", "70000", "PORT"),
        ("SLIPSTREAM_DTYPE", "int8", "'auto', 'bfloat16', 'float32' or 'float16'"),
        ("SLIPSTREAM_MAX_WAITING", "0", "SLIPSTREAM_MAX_WAITING"),
        ("SLIPSTREAM_ENGINE_CPUS", "nan", "SLIPSTREAM_ENGINE_CPUS"),
        ("SLIPSTREAM_ADMIN_KEY", "short", "at least 16 characters"),
        ("SLIPSTREAM_MODELS", "not json", "written as JSON"),
        ("SLIPSTREAM_MODELS", "3", "SLIPSTREAM_MODELS"),
        ("SLIPSTREAM_MODELS", '[{"idd": "x"}]', "Did you mean 'id'?"),
        ("SLIPSTREAM_MODELS", '[{"id": "x"}, {"id": "x"}]', "two models are named 'x'"),
        ("SLIPSTREAM_DTPYE", "float32", "Did you mean SLIPSTREAM_DTYPE?"),
        ("SLIPSTREAM_CONFIG", "/there/is/none.yaml", "not a file"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert said in str(caught.value)


def test_a_flat_mistake_is_reported_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_BLOCK_SIZE", "-1")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert str(caught.value).startswith("SLIPSTREAM_BLOCK_SIZE,")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 8000", "Did you mean 'port'?"),
        ("- a\n- b\n", "slipstream.yaml"),
        ("port: [", "slipstream.yaml"),
        ("just words", "slipstream.yaml"),
        ("models: {}", "models"),
        ("models: [1]", "models"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    write_yaml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert said in str(caught.value)


@pytest.mark.parametrize("field", ["admin_key", "redis_url"])
def test_secrets_are_shown_neither_in_errors_nor_in_the_settings(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setenv(variable_name(field), "hunter2hunter2hunter2")
    assert "hunter2" not in repr(load_settings())
    monkeypatch.setenv("SLIPSTREAM_ADMIN_KEY", "hunter2")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_variables_that_kubernetes_adds_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SLIPSTREAM_PORT", "tcp://10.0.0.1:80"), ("SLIPSTREAM_SERVICE_HOST", "10.0.0.1")):
        monkeypatch.setenv(name, value)
    assert load_settings().port == 8000


def test_settings_are_frozen() -> None:
    settings: Any = load_settings()
    with pytest.raises(ValidationError):
        settings.port = 1
    with pytest.raises(ValidationError):
        settings.models[0].dtype = "float32"


def test_a_home_under_the_users_is_expanded() -> None:
    assert load_settings(home="~/x").home == Path("~/x").expanduser()


@pytest.mark.parametrize(
    ("base_model", "slug"),
    [("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"), ("/models/my base", "my-base"), ("/", "model")],
)
def test_slugs_suit_deployment_names(base_model: str, slug: str) -> None:
    assert load_settings(base_model=base_model).models[0].slug == slug


def test_the_table_has_a_row_for_every_setting() -> None:
    table = settings_table()
    assert all(f"| `{variable_name(name)}` | `{name}` |" in table for name in Settings.model_fields)
    assert all(field.description for field in (*Settings.model_fields.values(), *ModelDefaults.model_fields.values()))


def test_the_readme_carries_the_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert settings_table().strip() in text
    assert rules_table().strip() in text
