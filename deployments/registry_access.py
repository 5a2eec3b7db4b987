"""The registry for an operator's command: the one that settings name, or the embedded one of this machine's data folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapter_registry.backup.redis_data import RegistryData
from adapter_registry.blobs import ObstoreBlobs
from deployments.embedded_redis import EmbeddedRedis, check_redis_url, embedded_redis
from deployments.home import open_home
from slipstream.config import Settings
from slipstream.errors import ConfigError

_TIMEOUT_S = 60.0  # one script reads all of a tenant's records


@dataclass(frozen=True, slots=True)
class RegistryAddress:
    """Where its two halves are."""

    redis_url: str
    blob_url: str

    def open(self) -> tuple[RegistryData, ObstoreBlobs]:
        """Connections to both, of the event loop that runs."""
        return RegistryData.from_url(self.redis_url, timeout_s=_TIMEOUT_S), ObstoreBlobs.from_url(self.blob_url)


@contextmanager
def registry_address(settings: Settings, *, alone: bool) -> Iterator[RegistryAddress]:
    """The registry while the body runs. An embedded server that does not run is started for it; `alone` refuses one that
    runs, because `slipstream serve` uses it. Raises `ConfigError`."""
    if settings.redis_url is not None:
        check_redis_url(settings.redis_url)
        if (
            settings.blob_url is None
        ):  # the data folder of this machine is hardly where the gateways of that Redis keep files
            raise ConfigError(
                "SLIPSTREAM_REDIS_URL is set, and SLIPSTREAM_BLOB_URL is not: name the blob store that the gateways use "
                f"(file://{settings.home / 'blobs'} if it is this machine's data folder)."
            )
        yield RegistryAddress(settings.redis_url.get_secret_value(), settings.blob_url)
        return
    blob_url = settings.blob_url or f"file://{settings.home / 'blobs'}"
    if not (settings.home / "redis").is_dir() and not alone:
        raise ConfigError(
            f"There is no registry in {settings.home}: set SLIPSTREAM_HOME to the data folder, or SLIPSTREAM_REDIS_URL."
        )
    with ExitStack() as stack:
        try:
            home = stack.enter_context(open_home(settings.home))
        except ConfigError:
            running = None if alone else _running(settings.home / "redis")
            if running is None:
                raise
            yield RegistryAddress(running.url, blob_url)
            return
        started = stack.enter_context(embedded_redis(home.redis, home.logs / "redis.log"))
        yield RegistryAddress(started.url, blob_url)


def _running(folder: Path) -> EmbeddedRedis | None:
    """The server that `slipstream serve` has started on this data folder."""
    try:
        state = json.loads((folder / "server.json").read_text(encoding="utf-8"))
        password = (folder / "password").read_text(encoding="utf-8").strip()
        return EmbeddedRedis(int(state["pid"]), int(state["port"]), password)
    except (OSError, ValueError, KeyError, TypeError):
        return None
