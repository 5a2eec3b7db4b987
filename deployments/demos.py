"""The demo adapters: Turbo LoRAs for the default base model that `slipstream serve` publishes to the demo tenant.

They lie in `examples/adapters/<name>/` of a checkout, and in `demo_adapters` of an installed wheel. `demos.json` beside
the folders says what each is for. They go the way of every adapter: over HTTP, checked, and numbered once per content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapter_registry.records import Name
from slipstream.adapters.rejection import Rule
from slipstream.client import SlipstreamClient
from slipstream.errors import ConfigError, InvalidRequest, NotFound, SlipstreamError

DEMO_LIST = "demos.json"
_OURS = "admin"  # `created_by` of what is published with the admin key, as the demos are


class Demo(BaseModel):
    """One line of `demos.json`; the folder beside it has the same name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    description: Annotated[str, Field(min_length=1, max_length=200)]
    prompt: Annotated[str, Field(min_length=1)]  # as the adapter was trained on it: raw, for /v1/completions
    max_tokens: Annotated[int, Field(ge=1)] = 64


@dataclass(frozen=True, slots=True)
class PublishedDemo:
    """A demo that answers, and as what."""

    demo: Demo
    ref: str  # name@version


def demo_folder(package: Path = Path(__file__).parent) -> Path | None:
    """Where the demo adapters are, if they came along."""
    # In this order: a wheel's own, and only then what lies beside the package, which a checkout has.
    candidates = (package / "demo_adapters", package.parent / "examples" / "adapters")
    return next((folder for folder in candidates if (folder / DEMO_LIST).is_file()), None)


def read_demos(folder: Path) -> Sequence[Demo]:
    """The demos of a folder. Raises `ConfigError`."""
    path = folder / DEMO_LIST
    try:
        return TypeAdapter(tuple[Demo, ...]).validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read as the list of demo adapters: correct it, or set SLIPSTREAM_DEMO_ADAPTERS=false. "
            f"({error})"
        ) from error


async def publish_demos(
    client: SlipstreamClient, folder: Path, models: Sequence[str], warn: Callable[[str], None]
) -> tuple[PublishedDemo, ...]:
    """Publish what fits one of the served `models`, and say what failed: a demo is no reason not to serve.

    `client` acts for the demo tenant with the admin key. A name that somebody else has published under is left alone: a
    start must not change what a model name means to its users.
    """
    published = []
    for demo in read_demos(folder):
        try:
            ref = await _publish(client, folder / demo.name, models) if await _is_ours(client, demo.name) else None
        except SlipstreamError as error:
            warn(f"The demo adapter '{demo.name}' was not published: {error}")
            continue
        if ref is not None:
            published.append(PublishedDemo(demo, ref))
    return tuple(published)


async def _is_ours(client: SlipstreamClient, name: str) -> bool:
    try:
        adapter = await client.get_adapter(name)
    except NotFound:
        return True
    return all(version["created_by"] == _OURS for version in adapter["versions"])


async def _publish(client: SlipstreamClient, folder: Path, models: Sequence[str]) -> str | None:
    """The version's reference, or None when no served model is its base."""
    for model in models:
        try:
            version, _ = await client.push(folder, folder.name, base=model)
        except InvalidRequest as error:
            if error.code != Rule.BASE_MISMATCH:
                raise
        else:
            return str(version["ref"])
    return None
