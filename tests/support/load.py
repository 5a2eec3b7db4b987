"""Load from the openai client whose every answer is checked: none lost, none wrong, no token twice."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import openai


@dataclass(frozen=True)
class Question:
    """One request and how it is sent."""

    model: str
    prompt: str
    stream: bool
    temperature: float
    seed: int
    n: int = 1
    max_tokens: int = 60


@dataclass
class Answer:
    """Texts by choice, and counted tokens."""

    texts: list[str]
    completion_tokens: int


@dataclass
class Load:
    """Clients that ask until they are told to stop."""

    client: openai.AsyncOpenAI
    questions: Sequence[Question]
    expected: dict[Question, Answer] = field(default_factory=dict)
    answered: int = 0
    tokens: int = 0  # of these answers
    wrong: list[tuple[Question, Answer]] = field(default_factory=list)
    lost: list[tuple[Question, str]] = field(default_factory=list)
    broken: int = 0  # streams that ended with a broken connection, after right text

    async def learn(self) -> None:
        """What the answers are while nothing is disturbed."""
        answers = await asyncio.gather(*map(self.ask, self.questions))
        self.expected = dict(zip(self.questions, answers, strict=True))

    async def ask(self, question: Question) -> Answer:
        """One request."""
        common: dict[str, Any] = {
            "model": question.model, "prompt": question.prompt, "temperature": question.temperature, "seed": question.seed,
            "n": question.n, "max_tokens": question.max_tokens, "extra_body": {"ignore_eos": True},
        }  # fmt: skip
        if not question.stream:
            whole = await self.client.completions.create(**common)
            assert whole.usage is not None
            return Answer([choice.text for choice in whole.choices], whole.usage.completion_tokens)
        texts, tokens = [""] * question.n, -1
        stream = await self.client.completions.create(**common, stream=True, stream_options={"include_usage": True})
        try:
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                tokens = chunk.usage.completion_tokens if chunk.usage is not None else tokens
        except openai.APIStatusError:
            raise
        except Exception as error:
            raise BrokenStream(texts) from error
        if tokens < 0:
            raise BrokenStream(texts)
        return Answer(texts, tokens)

    async def _client(self, number: int, until: asyncio.Event) -> None:
        for i in itertools.count(number):
            if until.is_set():
                return
            question = self.questions[i % len(self.questions)]
            try:
                answer = await self.ask(question)
            except BrokenStream as stream:
                whole = self.expected[question].texts
                if all(text.startswith(part) for text, part in zip(whole, stream.texts, strict=True)):
                    self.broken += 1
                else:
                    self.wrong.append((question, Answer(stream.texts, -1)))
            except openai.OpenAIError as error:
                self.lost.append((question, repr(error)))
                await asyncio.sleep(0.2)
            else:
                self.answered += 1
                self.tokens += answer.completion_tokens
                if answer != self.expected[question]:
                    self.wrong.append((question, answer))

    @asynccontextmanager
    async def going(self, clients: int = 8) -> AsyncIterator[Load]:
        """Ask all the while; at the end every open request has been answered."""
        until = asyncio.Event()
        tasks = [asyncio.create_task(self._client(i * 7, until)) for i in range(clients)]
        try:
            yield self
        finally:
            until.set()
            await asyncio.gather(*tasks)

    async def grows(self, count: int, timeout_s: float = 180) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + count
        async with asyncio.timeout(timeout_s):
            while self.answered < wanted:
                await asyncio.sleep(0.05)

    def verdict(self) -> Mapping[str, Any]:
        """For one assertion that shows all of it."""
        return {"lost": self.lost, "wrong": self.wrong, "broken": self.broken}


class BrokenStream(Exception):
    """A stream that ended before its usage came."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__("broken")
        self.texts = texts


UNHARMED: Mapping[str, Any] = {"lost": [], "wrong": [], "broken": 0}


def questions(models: Sequence[str], tokens: int = 60) -> list[Question]:
    """Greedy and sampled, whole and streamed, one choice and two."""
    shapes = [(False, 0.0, 1), (True, 0.0, 1), (True, 0.9, 1), (False, 0.9, 2), (True, 0.9, 2)]
    return [
        Question(model, f"{model} says {i}: ", stream, temperature, seed=i, n=n, max_tokens=tokens)
        for i, (model, (stream, temperature, n)) in enumerate(itertools.product(models, shapes))
    ]
