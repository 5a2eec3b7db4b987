"""The Serve application builder, and the Serve config that says the same as `slipstream serve`."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema
from support.serve_apps import deployments
from typer.testing import CliRunner

from deployments import app, main  # noqa: F401 - `main` adds `serve` and `config` to the command line
from deployments.serve_local import for_this_machine
from slipstream.cli import app as command_line
from slipstream.config import Settings, load_settings
from slipstream.errors import ConfigError

SECRETS = {"SLIPSTREAM_REDIS_URL": "redis://nowhere", "SLIPSTREAM_ADMIN_KEY": "k" * 16}
YAML = """
drain_s: 7
target_requests_per_s: 3
models:
  - {id: one, min_replicas: 1, max_replicas: 4, request_tokens: 200}
  - {id: two, tensor_parallel_size: 3, engine_cpus: 0.5, min_replicas: 0, quantize: int8}
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_on_a_cluster_threads_are_the_reserved_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Settings] = []
    monkeypatch.setattr(app, "build_application", built.append)
    app.build(app.AppArgs(models=[{"id": "a", "engine_cpus": 1.5}, {"id": "b", "engine_threads": 7}]))
    assert [model.engine_threads for model in built[0].models] == [2, 7]


def test_the_serve_config_starts_what_the_command_starts(tmp_path: Path) -> None:
    (tmp_path / "slipstream.yaml").write_text(YAML)
    done = CliRunner().invoke(command_line, ["config", "--serve"])
    assert done.exit_code == 0, done.output
    page = yaml.safe_load(done.output)
    ServeDeploySchema.model_validate(page)
    assert SECRETS["SLIPSTREAM_ADMIN_KEY"] not in done.output
    (tmp_path / "slipstream.yaml").unlink()  # the page alone says it all

    (application,) = page["applications"]
    from_page = deployments(app.build(app.AppArgs(**application["args"])))
    (tmp_path / "slipstream.yaml").write_text(YAML)
    from_command = deployments(app.build_application(for_this_machine(load_settings())))
    assert from_page == from_command
    assert set(from_page) == {"Gateway", "EngineReplica-one", "EngineReplica-two"}


def test_what_the_settings_say_reaches_serve(tmp_path: Path) -> None:
    (tmp_path / "slipstream.yaml").write_text(YAML)
    found = deployments(app.build_application(load_settings()))
    one, two = found["EngineReplica-one"][0], found["EngineReplica-two"][0]
    assert (one["autoscaling_config"]["min_replicas"], one["autoscaling_config"]["max_replicas"]) == (1, 4)
    policy = one["autoscaling_config"]["policy"]
    assert policy["policy_function"] == "deployments.scaling_policy:RequestRatePolicy"
    assert policy["policy_kwargs"]["target_requests_per_s"] == 3
    assert policy["policy_kwargs"]["request_tokens"] == 200
    assert one["graceful_shutdown_timeout_s"] == 7
    assert two["autoscaling_config"]["initial_replicas"] == 1
    assert one["autoscaling_config"]["initial_replicas"] is None, "a redeployment keeps as many as there are"
    assert found["EngineReplica-one"][2] is None
    assert found["EngineReplica-two"][2] == [{"CPU": 0.5}] * 3


def test_how_to_log_and_where_spans_go_reaches_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "log_format: json\nlog_level: DEBUG\notlp_endpoint: http://collector:4318\n"
    (tmp_path / "slipstream.yaml").write_text(text)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=hunter2")
    page = CliRunner().invoke(command_line, ["config", "--serve"]).output
    assert "hunter2" not in page
    assert yaml.safe_load(page)["logging_config"] == {
        "encoding": "JSON",
        "log_level": "DEBUG",
        "enable_access_log": False,
        "additional_log_standard_attrs": ["name"],
    }
    found = deployments(app.build_application(load_settings(), logs_dir=tmp_path))
    for config, _, _, plan in found.values():
        assert config["logging_config"]["encoding"] == "JSON"
        assert config["logging_config"]["logs_dir"] == str(tmp_path)
        assert not config["logging_config"]["enable_access_log"]
        assert (plan.telemetry.log_level, plan.telemetry.log_format) == ("DEBUG", "json")
        assert plan.telemetry.tracing.endpoint == "http://collector:4318"
        headers = plan.telemetry.tracing.variables["OTEL_EXPORTER_OTLP_HEADERS"]
        assert headers.get_secret_value() == "api-key=hunter2"
        assert "hunter2" not in repr(plan)


def test_serve_itself_calls_the_builder() -> None:
    """As `serve run`, `serve deploy` and KubeRay do it, with and without arguments."""
    for args in ({}, {"gateway_replicas": 3, "models": [{"id": "a"}]}):
        application = call_user_app_builder_with_args_if_necessary(app.build, args)
        replicas = application._bound_deployment._deployment_config.num_replicas
        assert replicas == args.get("gateway_replicas", 1)
    with pytest.raises(ValueError, match="num_replica"):
        call_user_app_builder_with_args_if_necessary(app.build, {"num_replica": 2})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_replica"):
        app.AppArgs(num_replica=2)


def test_without_secrets_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIPSTREAM_REDIS_URL")
    with pytest.raises(ConfigError, match="SLIPSTREAM_REDIS_URL"):
        app.build(app.AppArgs())


@pytest.mark.parametrize("url", ["localhost:6379", "http://redis", "redis+sentinel://:secret@host/x", "redis://h:port"])
def test_what_is_no_address_of_redis_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("SLIPSTREAM_REDIS_URL", url)
    with pytest.raises(ConfigError, match="SLIPSTREAM_REDIS_URL") as refused:
        app.build(app.AppArgs())
    assert "secret" not in str(refused.value)


def test_gateways_follow_open_requests_where_their_number_may_change(tmp_path: Path) -> None:
    (tmp_path / "slipstream.yaml").write_text("{gateway_replicas: 2, max_gateway_replicas: 5}")
    gateway = deployments(app.build_application(load_settings()))["Gateway"][0]
    scaling = gateway["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5)
    assert scaling["target_ongoing_requests"] < gateway["max_ongoing_requests"]
    (tmp_path / "slipstream.yaml").write_text("{gateway_replicas: 2, max_gateway_replicas: 2}")
    fixed = deployments(app.build_application(load_settings()))["Gateway"][0]
    assert (fixed["autoscaling_config"], fixed["num_replicas"]) == (None, 2)


def test_training_jobs_ask_for_their_own_resources(tmp_path: Path) -> None:
    (tmp_path / "slipstream.yaml").write_text("training_resources: {training: 1}")
    plan = deployments(app.build_application(load_settings()))["Gateway"][3]
    assert plan.training.resources == {"training": 1.0}


def test_the_patch_of_a_rayservice_holds_what_was_set_and_no_secret(tmp_path: Path) -> None:
    (tmp_path / "slipstream.yaml").write_text(YAML)
    done = CliRunner().invoke(command_line, ["config", "--rayservice", "mine"])
    assert done.exit_code == 0, done.output
    patch = yaml.safe_load(done.output)
    assert (patch["kind"], patch["metadata"]) == ("RayService", {"name": "mine"})
    (application,) = yaml.safe_load(patch["spec"]["serveConfigV2"])["applications"]
    assert application["args"] == {
        "home": str(tmp_path),
        "drain_s": 7.0,
        "models": [
            {"target_requests_per_s": 3.0, "id": "one", "min_replicas": 1, "max_replicas": 4, "request_tokens": 200.0},
            {
                "target_requests_per_s": 3.0,
                "id": "two",
                "tensor_parallel_size": 3,
                "engine_cpus": 0.5,
                "min_replicas": 0,
                "quantize": "int8",
            },
        ],
    }
    assert not [secret for secret in SECRETS.values() if secret in done.output]


def test_one_config_at_a_time() -> None:
    done = CliRunner().invoke(command_line, ["config", "--serve", "--rayservice", "mine"])
    assert done.exit_code == 2
    assert "--rayservice" in done.output
