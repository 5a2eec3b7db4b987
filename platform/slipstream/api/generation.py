"""One call's engine streams, merged into one; the same for chat and text, streamed or not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

from adapter_registry.tenants import UsageCounts
from slipstream.api.catalog import Target
from slipstream.api.merging import Batch, merged
from slipstream.api.observing import note_first_token
from slipstream.errors import EngineFailed, Unavailable
from slipstream.metrics.gateway import Called, GatewayMetrics
from slipstream.protocol import FinishReason, GenerateEvent, GenerateRequest, TokenLogprob, Usage


@dataclass(slots=True)
class Choice:
    """One complete answer."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended."""

    counts: UsageCounts
    error: Exception | None
    whole: bool  # every choice was finished; without an error, its client has left otherwise
    begun: bool = False  # a stream whose first tokens were on their way
    decode_steps: int = 0  # of choices that are known to have finished
    reasons: tuple[FinishReason, ...] = ()  # of the same
    judged_tokens: int = 0  # of the same, like the next (`Usage`)
    right_tokens: int = 0


class Generation:
    """The streams of one call: one per prompt. Choices are numbered prompt x n + choice.

    `start` raises what the engine refuses, while the status can still be chosen; `aclose` cancels everything.
    """

    def __init__(
        self,
        target: Target,
        requests: Sequence[GenerateRequest],
        timeout_s: float,
        metrics: GatewayMetrics,
        settle: Callable[[Ending], None],
    ) -> None:
        """`settle` is told how it ended."""
        self._called = called_of(target, requests[0].tenant)
        self._n = requests[0].params.n
        self._streamed = requests[0].stream
        self._prompts = len(requests)
        self._streams = merged([target.engine.generate(request) for request in requests], timeout_s)
        self._metrics = metrics
        self._settle = settle
        self._error: Exception | None = None
        self._texts: dict[int, list[str]] | None = {} if target.keeps_texts else None  # of each choice, so far
        self._ended = asyncio.Event()
        self._open = set(range(len(requests) * self._n))
        self.usages: dict[int, Usage] = {}  # of choices that have finished
        self._sofar: dict[int, Usage] = {}  # of those that have not, when they began
        self._came: Counter[int] = Counter()  # tokens of each choice
        self._firsts: dict[int, tuple[float, int]] = {}  # of each choice: when its first tokens came, and how many
        self._begun = False
        self._reasons: list[FinishReason] = []

    async def start(self) -> None:
        """Wait for the first step of every prompt."""
        started = perf_counter()
        try:
            await self._streams.start()
        except BaseException as error:  # whatever it was, cancellation included: nothing may go on running
            self._blame(error)
            await self.aclose()
            raise
        if self._streamed:  # otherwise a remote engine sends everything at the end
            self._begun = True
            self._metrics.first_token(self._called, perf_counter() - started)
            note_first_token()

    async def events(self) -> AsyncGenerator[Batch]:
        """What each step added, until every choice has finished."""
        while batches := await self._next_batches():
            for batch in batches:
                yield batch
        if self._open:
            short = EngineFailed("The engine ended before the answer did.")
            self._blame(short)
            raise short
        self._count_prompts()

    async def _next_batches(self) -> list[Batch]:
        try:
            return [
                [self._note(event, number * self._n) for event in batch] for number, batch in await self._streams.take()
            ]
        except Exception as error:
            self._blame(error)
            raise

    def _blame(self, error: BaseException) -> None:
        """A client that goes away is nobody's fault."""
        self._error = error if isinstance(error, Exception) else None

    async def aclose(self) -> None:
        """Cancel what still runs. An engine in this process has let go of it when this returns; one behind Ray has been
        told to, and does so with its next step."""
        try:
            await self._streams.aclose()
        finally:
            if not self._ended.is_set():
                self._ended.set()
                usages = self.usages.values()
                self._settle(
                    Ending(
                        self._used(), self._error, not self._open, self._begun,
                        decode_steps=sum(usage.decode_steps for usage in usages),
                        reasons=tuple(self._reasons),
                        judged_tokens=sum(usage.judged_tokens for usage in usages),
                        right_tokens=sum(usage.right_tokens for usage in usages),
                    )
                )  # fmt: skip

    async def collect(self) -> list[Choice]:
        """Run to the end and return the choices in order."""
        choices = {index: Choice() for index in sorted(self._open)}
        try:
            async for batch in self.events():
                for event in batch:
                    choice = choices[event.index]
                    choice.text.append(event.text)
                    choice.logprobs.extend(event.logprobs or ())
                    choice.finish_reason = event.finish_reason or choice.finish_reason
        finally:
            await self.aclose()
        return list(choices.values())

    async def texts(self) -> list[str] | None:
        """Wait for the end; what each choice said, or None unless all were finished, of a target that keeps it."""
        await self._ended.wait()
        if self._open or self._texts is None:
            return None
        return self.said()

    def said(self) -> list[str]:
        """What each choice has said so far, of a target that keeps it."""
        return ["".join(pieces) for _, pieces in sorted((self._texts or {}).items())]

    def by_prompt(self) -> Iterable[list[Usage]]:
        """The usages of each prompt's choices."""
        for first in range(0, self._prompts * self._n, self._n):
            yield [self.usages[index] for index in range(first, first + self._n)]

    def _used(self) -> UsageCounts:
        """What this call has used; of choices that were cut short, what has come of them."""
        known = self._sofar | self.usages
        prompts = {index // self._n: usage.prompt_tokens for index, usage in known.items()}
        return UsageCounts(
            requests=int(bool(known)),
            prompt_tokens=sum(prompts.values()),
            completion_tokens=sum(max(u.completion_tokens, self._came[index]) for index, u in known.items()),
            drafted_tokens=sum(usage.drafted_tokens for usage in known.values()),
            accepted_tokens=sum(usage.accepted_tokens for usage in known.values()),
        )

    def _note(self, event: GenerateEvent, first: int) -> GenerateEvent:
        """Count it; numbered within the whole call. `first`: the number of its prompt's first choice."""
        if first:
            event = replace(event, index=first + event.index)
        self._came[event.index] += len(event.token_ids)
        if event.index not in self._firsts:
            self._firsts[event.index] = (perf_counter(), len(event.token_ids))
        if self._texts is not None:
            self._texts.setdefault(event.index, []).append(event.text)
        if event.usage is not None:
            self._sofar[event.index] = event.usage
        if event.finish_reason is FinishReason.ABORTED:
            raise Unavailable("The engine stopped this request before it was finished. Try again.")
        if event.finish_reason is not None:
            if event.usage is None:
                raise EngineFailed("A choice ended without its usage.")
            self._open.discard(event.index)
            self.usages[event.index] = event.usage
            self._reasons.append(event.finish_reason)
            self._metrics.generated(self._called, event.usage)
            self._time_tokens(event.index)
        return event

    def _time_tokens(self, index: int) -> None:
        since, before = self._firsts[index]
        if self._streamed and self._came[index] > before:
            self._metrics.later_tokens(self._called, self._came[index] - before, perf_counter() - since)

    def _count_prompts(self) -> None:
        for usages in self.by_prompt():
            self._metrics.prompted(self._called, usages[0].prompt_tokens, cached_tokens(usages))


def called_of(target: Target, tenant: str) -> Called:
    """Who calls what, for the metrics."""
    return Called(target.base_id, tenant, target.version.digest if target.version is not None else None)


def cached_tokens(usages: Sequence[Usage]) -> int:
    """Prompt tokens that were not computed for this call: later choices share the first one's, which is no saving."""
    return min(usage.cached_prompt_tokens for usage in usages)
