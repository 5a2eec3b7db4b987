"""What a request's `model` means: a base model's own id first, then a name in the registry."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from adapter_registry.errors import InvalidName, NotPublished
from adapter_registry.records import AdapterVersion, PromptFormat, Route, Watch, parse_reference
from adapter_registry.store import Store
from slipstream.api.caller import Caller
from slipstream.api.observing import note_model
from slipstream.api.recent import RecentAnswers
from slipstream.errors import InvalidRequest, NotFound, ServerError
from slipstream.protocol import AdapterRef, BaseModelSpec, EngineClient, Speculation

_SPEC_FRESH_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """An engine, and the adapter to run on it."""

    base_id: str
    engine: EngineClient
    spec: BaseModelSpec
    version: AdapterVersion | None = None
    shared: bool = False  # the adapter is another tenant's
    watch: Watch | None = None  # the alias that led here, if what becomes of its requests is counted
    shadow: AdapterVersion | None = None  # answers this request as well, unseen
    keeps_texts: bool = False  # answers are compared when they are complete

    @property
    def served_as(self) -> str:
        """What the response says answered: the base's id, `name@version`, or another tenant's `tenant/name@version`."""
        if self.version is None:
            return self.base_id
        return f"{self.version.tenant}/{self.version.ref}" if self.shared else self.version.ref

    @property
    def adapter(self) -> AdapterRef | None:
        """What travels below the gateway."""
        return AdapterRef(self.version.tenant, self.version.digest) if self.version else None

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes exactly when the weights do."""
        digest = self.version.digest if self.version else self.spec.base_digest
        return "fp_" + digest.removeprefix("sha256:")[:12]

    def speculation(self, asked: Speculation) -> Speculation:
        """What goes to the engine: "auto" is what the version's policy says, anything else is the caller's own choice."""
        if asked is None and self.version is not None and not self.version.speculation.enabled:
            return False
        return asked

    def check_chat(self) -> None:
        """Raise `InvalidRequest` when chat messages cannot be turned into a prompt for this model."""
        if self.version and self.version.prompt_format is PromptFormat.RAW:
            raise InvalidRequest(
                f"'{self.version.ref}' was trained on raw prompts, without a chat template, so chat messages would not "
                "reach it as it learned them. Send the prompt to /v1/completions.",
                code="raw_prompt_format",
                param="model",
            )
        if not self.spec.has_chat_template:
            raise InvalidRequest(
                f"'{self.base_id}' has no chat template. Send the prompt to /v1/completions.",
                code="no_chat_template",
                param="model",
            )


class Catalog:
    """The base models served here and the way from a name to an engine."""

    def __init__(
        self,
        engines: Mapping[str, EngineClient],
        store: Store,
        names: RecentAnswers[tuple[str, str], Route],
        clock: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._store = store
        self._names = names
        self._clock = clock
        self._specs: dict[str, tuple[float, BaseModelSpec]] = {}  # when it was asked for, and the answer

    async def bases(self) -> list[Target]:
        """Every base model."""
        specs = await asyncio.gather(*map(self._spec, self._engines))
        return [Target(base, self._engines[base], spec) for base, spec in zip(self._engines, specs, strict=True)]

    async def base(self, name: str | None) -> Target:
        """The base model called `name`, or the only one. Raises `InvalidRequest` with the choices."""
        only = next(iter(self._engines)) if len(self._engines) == 1 else None
        base = only if name is None else self.base_of(name)
        if base is None:
            why = "Several base models are served" if name is None else f"No base model '{name}' is served"
            raise InvalidRequest(f"{why}: send 'base' as one of {', '.join(self._engines)}.", param="base")
        return Target(base, self._engines[base], await self._spec(base))

    async def base_for_training(self, model: str) -> Target:
        """The base model called `model`. Raises `NotFound` with the choices; adapters are no base."""
        base = self.base_of(model)
        if base is None:
            raise NotFound(
                f"Fine-tuning starts from a base model that is served here, and '{model[:200]}' is none: send 'model' as "
                f"one of {', '.join(self._engines)}. To speed an adapter up, name it in 'slipstream.adapter'.",
                code="model_not_found",
                param="model",
            )
        return Target(base, self._engines[base], await self._spec(base))

    async def resolve(self, caller: Caller, model: str, user: str | None = None, split: bool = False) -> Target:
        """The target of `model`; with `split`, of an alias whose requests are split, on the side of this `user`.

        Raises `NotFound`, the same for unknown names, other tenants' and those that the key is not for.
        """
        tenant, base = caller.acting_tenant(), self.base_of(model)
        note_model(model)
        unknown = NotFound(
            f"The model '{model[:200]}' does not exist, or you do not have access to it. GET /v1/models lists yours.",
            code="model_not_found",
            param="model",
        )
        if base is not None:
            if not caller.may_call(base):
                raise unknown
            return Target(base, self._engines[base], await self._spec(base))
        try:
            selector = parse_reference(model)
            label = selector.name if selector.tenant in (None, tenant) else f"{selector.tenant}/{selector.name}"
            if not caller.may_call(label):
                raise unknown
            point = _point(tenant, label, selector.alias or "prod", user) if split else None
            route = await self._names.ask((tenant, model), lambda: self._store.route(tenant, selector, point))
        except (InvalidName, NotPublished):
            raise unknown from None
        assert route is not None  # `route` raises instead
        target = await self._on_its_base(route.version)
        shared = route.version.tenant != tenant
        shadow = None if shared else route.shadow  # nobody pays for what another tenant tries out
        return replace(target, shared=shared, watch=route.watch, shadow=shadow, keeps_texts=shadow is not None)

    async def shadow_of(self, target: Target) -> Target | None:
        """Where the copy of a request goes, if it has one."""
        if target.shadow is None:
            return None
        return replace(await self._on_its_base(target.shadow), watch=target.watch, keeps_texts=True)

    def forget(self, tenant: str, name: str) -> None:
        """Versions of this adapter were removed: an outage must not bring them back."""
        self._names.forget(lambda route: route.version.tenant == tenant and route.version.name == name)

    async def _on_its_base(self, version: AdapterVersion) -> Target:
        for base, (_, spec) in self._specs.items():  # without waking others
            if version.base_digest == spec.base_digest:
                return Target(base, self._engines[base], await self._spec(base), version)
        bases = await self.bases()
        for target in bases:
            if version.base_digest == target.spec.base_digest:
                return Target(target.base_id, target.engine, target.spec, version)
        # A version without a digest was accepted against some base here by its name alone.
        wanted = _basename(version.base_model).lower()
        named = [t for t in bases if wanted == _basename(t.base_id).lower()] or bases
        if version.base_digest is None and len(named) == 1:
            return Target(named[0].base_id, named[0].engine, named[0].spec, version)
        raise NotFound(
            f"'{version.ref}' was made for the base model '{version.base_model}', which is not served here.",
            code="model_not_found",
            param="model",
        )

    def base_of(self, model: str) -> str | None:
        """The id of the base model that `model` names, in full or without its owner."""
        if model in self._engines:
            return model
        return next((base for base in self._engines if _basename(base) == model), None)

    async def _spec(self, base: str) -> BaseModelSpec:
        """Asked for now and then: a rolling update may change a base under its name. Nobody is woken for that."""
        kept = self._specs.get(base)
        if kept is not None and self._clock() - kept[0] < _SPEC_FRESH_S:
            return kept[1]
        engine = self._engines[base]
        if kept is not None:
            self._specs[base] = (self._clock(), kept[1])  # others need not ask as well
        try:
            asleep = kept is not None and not (await engine.stats()).replicas
            spec = kept[1] if kept is not None and asleep else await engine.describe()
        except ServerError:
            if kept is None:
                raise
            spec = kept[1]
        self._specs[base] = (self._clock(), spec)
        return spec


def _point(tenant: str, label: str, alias: str, user: str | None) -> float:
    """Where a request lies in [0, 1): of a user always in the same place, for an alias; else anywhere."""
    if user is None:
        return random.random()  # noqa: S311 - it spreads load, it guards nothing
    digest = hashlib.sha256(f"{tenant}\0{label}\0{alias}\0{user}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _basename(model: str) -> str:
    return model.rpartition("/")[2]
