"""A private, quiet Ray on this machine: loopback only, its own token, its own temporary folder, all gone afterwards."""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from deployments.home import Home
from slipstream.config import Settings
from slipstream.process_env import prepare_environment

_OBJECT_STORE_BYTES = 256 << 20  # our messages are small and travel inline


def prepare_ray_environment() -> None:
    """Must run before Ray is imported in this process: it reads its switches then."""
    prepare_environment(
        {
            # Explicit: Ray otherwise turns it on by itself and writes a token into the user's home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Whatever address it is told, Ray listens on one that the network sees, unless there is to be no cluster.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares",
        },
        defaults={
            "RAY_SERVE_LOG_TO_STDERR": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_enable_metrics_collection": "0",
            # Ray kills a proxy that is not up after 5 s: on a busy or slow machine, with nothing in the page cache, the
            # first import alone takes longer.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
            # Serve's controller looks at everything every 0.1 s, which is 3 % of a core that here also computes.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        },
    )


@contextmanager
def local_ray(settings: Settings, home: Home) -> Iterator[None]:
    """Run Ray and Serve while the body runs."""
    import ray  # noqa: PLC0415 - not at the top: `prepare_ray_environment` comes first
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import HTTPOptions, ProxyLocation  # noqa: PLC0415

    from deployments.telemetry import serve_logging  # noqa: PLC0415

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _scratch_folder(home) as scratch, _ray_talk(home):
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, _cpus_needed(settings)),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=str(scratch),
                _node_ip_address="127.0.0.1",
            )
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=settings.host, port=settings.port),
                logging_config=serve_logging(settings, home.logs / "serve"),
            )
            yield
        finally:
            try:
                serve.shutdown()
            finally:
                ray.shutdown()
                _keep_logs(scratch, home.logs / "ray")


def sweep_leftovers(home: Home) -> None:
    """Remove what an earlier run that was killed could not. The caller owns the home."""
    try:
        noted = Path(home.scratch_note.read_text(encoding="utf-8").strip())
    except OSError:
        noted = None
    if noted is not None and noted.name.startswith("slipstream-"):
        shutil.rmtree(noted, ignore_errors=True)
    home.scratch_note.unlink(missing_ok=True)
    shutil.rmtree(home.uploads, ignore_errors=True)
    for left in home.adapter_cache.glob(".scratch-*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _ray_talk(home: Home) -> Iterator[None]:
    """A thread of Ray's prints the raylet's messages to `sys.stdout`, even with `log_to_driver` off: give it a file.

    What we say goes to the console that was made before.
    """
    home.logs.mkdir(parents=True, exist_ok=True)
    with (home.logs / "ray-driver.log").open("w", encoding="utf-8") as log, redirect_stdout(log):
        yield


@contextmanager
def _scratch_folder(home: Home) -> Iterator[Path]:
    # Not in the home, nor in macOS's long per-user folder: Ray's socket paths must stay under 104 characters.
    scratch = Path(tempfile.mkdtemp(prefix="slipstream-", dir="/tmp" if sys.platform == "darwin" else None))  # noqa: S108
    home.scratch_note.write_text(str(scratch), encoding="utf-8")
    inner = scratch / "r"  # Ray opens its folder to everybody; the one around it stays ours alone
    inner.mkdir()
    try:
        yield inner
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        home.scratch_note.unlink(missing_ok=True)


def _cpus_needed(settings: Settings) -> int:
    """Ray's CPUs are only its own book-keeping: on a small machine count enough of them for everything to be placed."""
    engines = sum(m.most_replicas * m.tensor_parallel_size * m.engine_cpus for m in settings.models)
    training = settings.max_training_jobs * settings.training_cpus
    gateways = (settings.max_gateway_replicas or settings.gateway_replicas) * settings.gateway_cpus
    return math.ceil(gateways + engines + training)


def _keep_logs(scratch: Path, kept: Path) -> None:
    """Replace the previous run's Ray logs by this run's."""
    for logs in scratch.glob("session_2*/logs"):
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept, ignore=shutil.ignore_patterns("events"), dirs_exist_ok=True)
