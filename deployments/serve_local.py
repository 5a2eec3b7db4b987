"""`slipstream serve`: everything on this machine, started in order and stopped in reverse."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx
from pydantic import SecretStr
from rich.console import Console

from adapter_registry.errors import StoreUnavailable
from adapter_registry.keys import hash_key, new_key
from adapter_registry.redis_store import RedisStore
from deployments.demos import PublishedDemo, demo_folder, publish_demos
from deployments.embedded_redis import check_redis_url, embedded_redis
from deployments.home import Home, kept_secret, open_home, write_secret
from deployments.local_ray import local_ray, prepare_ray_environment, sweep_leftovers
from deployments.terminal import TerminalProgress
from slipstream.base_models import prepare_base_model
from slipstream.client import SlipstreamClient
from slipstream.config import ModelSettings, Settings
from slipstream.errors import ConfigError, InvalidRequest, Unavailable

DEMO_TENANT = "demo"
_READY_TIMEOUT_S = 300.0
_LONGEST_DRAIN_S = 10.0  # Ctrl-C should not take longer


class Stopped(BaseException):
    """SIGINT or SIGTERM came. Not an `Exception`: nothing on the way out may mistake it for a failure."""


@dataclass(frozen=True, slots=True)
class Started:
    """What a person needs to know."""

    url: str
    demo_key: str
    model_id: str
    demos: tuple[PublishedDemo, ...] = ()


def serve_local(settings: Settings, console: Console, engine: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then stop all of it. Raises `ConfigError` or `Unavailable` when it cannot
    start."""
    began = time.monotonic()
    with stop_signals(), ExitStack() as stack:
        try:
            started = start(settings, console, stack, engine)
            _announce(started, time.monotonic() - began, console)
            while True:
                time.sleep(3600)
        except Stopped:
            console.print("\nStopping …")
        finally:
            ignore_stop_signals()  # a second Ctrl-C must not cut the way out short
            stack.close()


def start(settings: Settings, console: Console, stack: ExitStack, engine: str | None) -> Started:
    """Start every part; what must be stopped goes on `stack`."""
    settings = for_this_machine(settings)
    progress = TerminalProgress(console)
    check_port(settings.host, settings.port)
    if settings.redis_url is not None:
        check_redis_url(settings.redis_url)
    home = stack.enter_context(open_home(settings.home))
    sweep_leftovers(home)
    models = tuple(_ready_model(model, home, progress) for model in settings.models)
    resolved = settings.model_copy(update={"models": models, "admin_key": _admin_key(settings, home)})
    with progress.phase("Starting the registry"):
        redis_url = settings.redis_url or SecretStr(
            stack.enter_context(embedded_redis(home.redis, home.logs / "redis.log")).url
        )
        resolved = resolved.model_copy(update={"redis_url": redis_url})
        demo_key = asyncio.run(_demo_key(redis_url.get_secret_value(), home))
    with progress.phase("Starting Ray Serve"):
        prepare_ray_environment()
        stack.enter_context(local_ray(settings, home))
        install_stop_signals()  # ray.init puts its own SIGTERM handler in place
    url = f"http://{_shown_host(settings.host)}:{settings.port}"
    with progress.phase("Loading the model"):
        _run_application(resolved, engine, home)
        _wait_until_ready(url)
    served = [model.id for model in models if model.id is not None]
    demos: tuple[PublishedDemo, ...] = ()
    if settings.demo_adapters and (folder := demo_folder()) is not None:
        with progress.phase("Publishing the demo adapters"):
            demos = asyncio.run(_publish_demos(resolved, url, folder, served, console))
    return Started(url, demo_key, served[0], demos)


def for_this_machine(settings: Settings) -> Settings:
    """What `slipstream serve` runs with: all cores between a replica's ranks, and a stop that people wait for."""
    cores = len(os.sched_getaffinity(0))
    models = tuple(
        model.model_copy(
            update={"engine_threads": model.engine_threads or max(1, cores // model.tensor_parallel_size)},
        )
        for model in settings.models
    )
    drains = {name: min(getattr(settings, name), _LONGEST_DRAIN_S) for name in ("drain_s", "gateway_drain_s")}
    return settings.model_copy(update={"models": models, **drains})


def check_port(host: str, port: int) -> None:
    """Refuse a taken port before anything starts."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the real listener: TIME_WAIT is no obstacle
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Port {port} on {host} cannot be used ({error.strerror}). "
                "Stop what listens there, or choose another with PORT=…"
            ) from error


def _ready_model(model: ModelSettings, home: Home, progress: TerminalProgress) -> ModelSettings:
    prepared = prepare_base_model(model.base_model, home.root, progress)
    return model.model_copy(update={"base_model": str(prepared.path), "id": model.id or prepared.id})


def _admin_key(settings: Settings, home: Home) -> SecretStr:
    return settings.admin_key or SecretStr(kept_secret(home.root / "admin.key"))


async def _demo_key(redis_url: str, home: Home) -> str:
    """The demo tenant's key: the one from last time while the registry still knows it, else a new one."""
    path = home.root / "demo.key"
    store = RedisStore.from_url(redis_url)
    try:
        if path.is_file():
            kept = path.read_text(encoding="utf-8").strip()
            if await store.find_key(hash_key(kept)) is not None:
                return kept
        secret, record = new_key(DEMO_TENANT, "made by slipstream serve")
        await store.put_key(record)
    except StoreUnavailable as error:
        raise Unavailable("The registry's Redis does not answer. Check SLIPSTREAM_REDIS_URL.") from error
    finally:
        await store.close()
    write_secret(path, secret)
    return secret


async def _publish_demos(
    settings: Settings, url: str, folder: Path, models: Sequence[str], console: Console
) -> tuple[PublishedDemo, ...]:
    def warn(text: str) -> None:
        console.print(f"  {text}", soft_wrap=True, markup=False, highlight=False)

    assert settings.admin_key is not None
    transport = httpx.AsyncHTTPTransport()  # our own address: never through a proxy that the environment names
    try:
        async with SlipstreamClient(
            url, settings.admin_key.get_secret_value(), tenant=DEMO_TENANT, transport=transport
        ) as client:
            return await publish_demos(client, folder, models, warn)
    except InvalidRequest as error:  # an admin key that no header can carry
        warn(f"The demo adapters were not published: {error}")
        return ()


def _run_application(settings: Settings, engine: str | None, home: Home) -> None:
    from ray import serve  # noqa: PLC0415 - after prepare_ray_environment
    from ray.exceptions import RayError  # noqa: PLC0415

    from deployments.app import build_application  # noqa: PLC0415
    from deployments.gateway import APP_NAME  # noqa: PLC0415
    from deployments.replica_plan import REAL_ENGINE  # noqa: PLC0415

    try:
        application = build_application(settings, engine=engine or REAL_ENGINE, logs_dir=home.logs / "serve")
        serve.run(application, name=APP_NAME, route_prefix="/")
    except (RuntimeError, RayError) as error:  # Ray's own where a replica died while Serve was still asking for it
        raise ConfigError(_why_not(APP_NAME, home)) from error


def _why_not(app_name: str, home: Home) -> str:
    """The reason a replica gave, out of Serve's status text."""
    from ray import serve  # noqa: PLC0415

    application = serve.status().applications.get(app_name)
    text = (
        "\n".join([application.message, *(d.message for d in application.deployments.values())]) if application else ""
    )
    ours = re.findall(
        r"^(?:slipstream\.errors\.|[\w.]*\.)?(?:ConfigError|ModelUnsupported|Unavailable): (.+)$", text, re.MULTILINE
    )
    return ours[-1] if ours else f"The application did not start. The reason is in {home.logs}."


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    with httpx.Client(base_url=url, timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get("/readyz").status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
    raise Unavailable(f"{url}/readyz did not become ready within {_READY_TIMEOUT_S:.0f} s.")


def _shown_host(host: str) -> str:
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _announce(started: Started, took_s: float, console: Console) -> None:
    for line in announcement(started, took_s):
        # No wrapping: the curl line is there to be copied.
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def announcement(started: Started, took_s: float) -> Sequence[str]:
    """What a person reads when the server is ready; its one curl line shows a Turbo LoRA where there is one."""
    return (
        "",
        f"Slipstream is ready at {started.url} ({took_s:.0f} s). Documentation: {started.url}/docs",
        f"Key of the tenant {DEMO_TENANT!r}: {started.demo_key}",
        *(_try_demo(started, started.demos[0]) if started.demos else _try_base(started)),
        "",
        "Ctrl-C stops it.",
    )


def _try_base(started: Started) -> Sequence[str]:
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": started.model_id, "messages": [question], "max_tokens": 32, "temperature": 0}
    return ("Try:", *_curl(started, "/v1/chat/completions", body))


def _try_demo(started: Started, shown: PublishedDemo) -> Sequence[str]:
    demo = shown.demo
    body = {"model": shown.ref, "prompt": demo.prompt, "max_tokens": demo.max_tokens, "temperature": 0}
    others = [f"Also published: {other.ref} ({other.demo.description})" for other in started.demos[1:]]
    return (
        f"Try a Turbo LoRA, {shown.ref} ({demo.description}):",
        *_curl(started, "/v1/completions", body),
        "Its tokens per step: usage.completion_tokens / usage.decode_steps of the answer. With",
        '"speculation": false it is 1, and the text is the same.',
        *others,
    )


def _curl(started: Started, path: str, body: dict[str, object]) -> Sequence[str]:
    return (
        f"  curl {started.url}{path} -H 'Authorization: Bearer {started.demo_key}' \\",
        f"    -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
    )


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped` while the body runs."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    install_stop_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def install_stop_signals() -> None:
    """The first signal raises `Stopped`; further ones are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_stopped)


def ignore_stop_signals() -> None:
    """From here on we are leaving already."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    ignore_stop_signals()
    raise Stopped
