"""The RayService's Serve config, deployed as KubeRay deploys it, used, and upgraded in place under load."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.load import UNHARMED, Load, questions
from support.processes import eventually
from support.ray_cluster import ROOT
from support.rayservice import AppliedService, for_this_machine, ray_service, read_rayservice, serve_config
from support.tiny_model import save_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.timeout(600)]
K8S = ROOT / "k8s"
RAYSERVICE = (K8S / "base" / "rayservice.yaml", K8S / "overlays" / "local" / "serve-config.yaml")


@pytest.fixture(scope="module")
def service() -> Iterator[AppliedService]:
    """With the manifest's own config applied."""
    with ray_service(read_rayservice(*RAYSERVICE)) as found:
        found.apply(found.config())
        assert found.settled() == "RUNNING", found.details()
        yield found


@pytest.fixture(scope="module")
def base(service: AppliedService) -> str:
    """The name that the manifest gives its base model; adapters are published for it."""
    (application,) = service.config()["applications"]
    name: str = application["args"]["models"][0]["id"]
    service.publish(name, save_tiny_model(service.folder / "same", hidden=32))
    return name


def gateways(service: AppliedService) -> set[int]:
    """Processes of gateway replicas."""
    return set(service.actor_pids("ServeReplica:slipstream:Gateway"))


def engines(service: AppliedService, base: str) -> set[int]:
    """Processes of engine replicas, as they report themselves."""
    return {replica["ranks"][0]["pid"] for replica in service.replicas(base)}


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Every scalar of a document by its path."""
    if isinstance(value, dict):
        return {path: leaf for key, entry in value.items() for path, leaf in leaves(entry, f"{where}.{key}").items()}
    if isinstance(value, list):
        return {path: leaf for i, entry in enumerate(value) for path, leaf in leaves(entry, f"{where}.{i}").items()}
    return {where: value}


def test_only_what_a_laptop_forces_is_changed() -> None:
    manifest = serve_config(read_rayservice(*RAYSERVICE))
    before, after = leaves(manifest), leaves(for_this_machine(manifest, Path("/home"), 1, Path("/model")))
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    model, http = ".applications.0.args.models.0.", ".http_options."
    settings = ("base_model", "device", "dtype", "engine_threads", "kv_cache_bytes", "max_replicas")
    assert changed <= {f"{http}host", f"{http}port", ".applications.0.args.home", *(model + name for name in settings)}


def test_serve_runs_the_deployments_that_the_manifest_names(service: AppliedService, base: str) -> None:
    deployments = service.details()["deployments"]
    assert set(deployments) == {"Gateway", f"EngineReplica-{base}"}
    assert all(deployment["status"] == "HEALTHY" for deployment in deployments.values())
    assert service.ready()


def test_an_openai_client_lists_chats_streams_and_asks_adapters(service: AppliedService, base: str) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.key(), max_retries=0, timeout=60) as client:
        assert {base, *service.adapters} <= {model.id for model in client.models.list()}
        chat = client.chat.completions.create(
            model=base, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
        assert chat.usage is not None
        assert chat.choices[0].message.content is not None
        assert 0 < chat.usage.completion_tokens <= 8
        asked: dict[str, Any] = {"prompt": "one two", "max_tokens": 24, "temperature": 0}
        texts = {}
        for model in (base, *service.adapters):
            whole = client.completions.create(model=model, **asked)
            pieces = client.completions.create(model=model, stream=True, **asked)
            assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text
            texts[model] = whole.choices[0].text
            assert whole.model == (base if model == base else f"{model}@1")
        assert len(set(texts.values())) == len(texts), "every adapter has a text of its own"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """Another number of engines with another setting, and gateways with another one: all are replaced."""
    changed = copy.deepcopy(config)
    (application,) = changed["applications"]
    application["args"]["max_upload_bytes"] = 64 << 20
    for model in application["args"]["models"]:
        model |= {"min_replicas": 2, "max_replicas": 2, "max_waiting": 100}
    return changed


async def test_an_upgraded_config_loses_nothing_under_load(service: AppliedService, base: str) -> None:
    async with service.client() as client:
        load = Load(client, questions([base, *service.adapters]))
        await load.learn()
        used = await service.used_at_rest()
        old = gateways(service), engines(service, base)
        assert all(old)

        def replaced() -> bool:
            with contextlib.suppress(AssertionError, httpx.HTTPError):  # asked of a gateway that goes: asked again
                new = gateways(service), engines(service, base)
                return all(new) and not old[0] & new[0] and not old[1] & new[1] and len(new[1]) == 2
            return False

        async with load.going():
            await load.grows(20)
            await asyncio.to_thread(service.apply, upgraded(service.config()))
            assert await asyncio.to_thread(eventually, replaced, 180), service.details()
            assert await asyncio.to_thread(service.settled) == "RUNNING", service.details()
            await load.grows(20)
        assert load.verdict() == UNHARMED
        wanted = (used[0] + load.answered, used[1] + load.tokens)
        counted = await service.counted(used, load.answered, load.tokens)
        assert counted, f"each answer once, whoever gave it: {wanted} and not {service.used()}"


async def test_a_config_that_cannot_be_built_leaves_what_runs_alone(service: AppliedService, base: str) -> None:
    """A bad upgrade says why where operators look, and the replicas of the last good one go on answering."""
    before = engines(service, base)
    broken = upgraded(service.config())
    broken["applications"][0]["args"]["models"][0]["max_num_seqs"] = 0
    await asyncio.to_thread(service.apply, broken)
    assert await asyncio.to_thread(service.settled) == "DEPLOY_FAILED"
    assert "max_num_seqs" in (await asyncio.to_thread(service.details))["message"]
    assert engines(service, base) == before
    async with service.client() as client:
        answer = await client.completions.create(model=base, prompt="still", max_tokens=2)
    assert answer.choices
