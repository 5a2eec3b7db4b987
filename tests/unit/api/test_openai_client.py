"""What the `openai` package reads from our answers."""

from __future__ import annotations

from dataclasses import replace

import openai as openai_package
import pytest
from openai import AsyncOpenAI
from support.api_app import BASE, ApiWorld

from slipstream.api.completions import _logprobs, _Shown
from slipstream.protocol import TokenLogprob
from slipstream.testing import FAKE_BASE, FakeAnswer


async def test_chat_answers(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("hello there my friend")
    answer = await openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "say hello"}], seed=1, max_completion_tokens=20
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == BASE
    assert answer.system_fingerprint == "fp_" + FAKE_BASE.base_digest[7:19]
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello there my friend")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 4, 6)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_usage_counts_drafts_and_steps(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("one two three four five")
    answer = await openai.completions.create(model=BASE, prompt="count", max_tokens=5)
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (2, 0)
    assert answer.usage.model_dump()["decode_steps"] == 3


async def test_chat_streams(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("hello there my friend")
    chunks = [
        chunk
        async for chunk in await openai.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    ]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].object == "chat.completion.chunk"
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello there my friend"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_streamed_choices_interleave(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("a b c d", "e f g h")
    texts: dict[int, str] = {0: "", 1: ""}
    order: list[int] = []
    stream = await openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], stream=True, n=2
    )
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            order.append(choice.index)
    assert texts == {0: "a b c d", 1: "e f g h"}
    assert order != sorted(order)


async def test_stream_without_usage_has_no_usage_chunk(openai: AsyncOpenAI) -> None:
    stream = await openai.completions.create(model=BASE, prompt="x", stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


async def test_completions_of_several_prompts(openai: AsyncOpenAI, world: ApiWorld) -> None:
    answer = await openai.completions.create(model=BASE, prompt=["first one", "second"], n=2, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    alone = await openai.completions.create(model=BASE, prompt="second", n=2, seed=3)
    assert [c.text for c in answer.choices[2:]] == [c.text for c in alone.choices]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3  # each prompt once, whatever n is
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_several_prompts_stream(openai: AsyncOpenAI) -> None:
    whole = await openai.completions.create(model=BASE, prompt=["p one", "p two", "p three"], seed=3)
    texts = ["", "", ""]
    async for chunk in await openai.completions.create(
        model=BASE, prompt=["p one", "p two", "p three"], seed=3, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
async def test_completions_of_token_ids(openai: AsyncOpenAI, world: ApiWorld, prompt: list[int]) -> None:
    answer = await openai.completions.create(model=BASE, prompt=prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    assert world.engine.requests[0].token_ids == (5, 6, 7)


async def test_completions_default_to_sixteen_tokens(openai: AsyncOpenAI, world: ApiWorld) -> None:
    await openai.completions.create(model=BASE, prompt="x")
    assert world.engine.requests[0].params.max_tokens == 16


async def test_echo_repeats_the_prompt(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("world again", "world again")
    whole = await openai.completions.create(model=BASE, prompt="hello ", echo=True)
    assert whole.choices[0].text == "hello world again"
    stream = await openai.completions.create(model=BASE, prompt="hello ", echo=True, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world again"


async def test_chat_logprobs(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("hé there")
    answer = await openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert [token.token for token in tokens] == ["hé", " there"]
    assert tokens[0].bytes == [104, 195, 169]
    assert len(tokens[0].top_logprobs) == 3
    assert tokens[0].logprob == -0.5


async def test_chat_logprobs_stream(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("one two three")
    stream = await openai.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": "hi"}], logprobs=True, stream=True
    )
    seen = [
        token.token
        async for chunk in stream
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert seen == ["one", " two", " three"]


@pytest.mark.parametrize("stream", [False, True])
async def test_text_logprobs(openai: AsyncOpenAI, world: ApiWorld, stream: bool) -> None:
    world.engine.enqueue("one two three")
    tokens: list[str] = []
    offsets: list[int] = []
    if stream:
        async for chunk in await openai.completions.create(model=BASE, prompt="p", logprobs=2, stream=True):
            scores = chunk.choices[0].logprobs
            if scores is not None:
                tokens += scores.tokens or []
                offsets += scores.text_offset or []
    else:
        answer = await openai.completions.create(model=BASE, prompt="p", logprobs=2)
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert scores.top_logprobs is not None
        assert all(len(top) == 2 for top in scores.top_logprobs)
        tokens, offsets = scores.tokens or [], scores.text_offset or []
    assert tokens == ["one", " two", " three"]
    assert offsets == [0, 3, 7]


async def test_length_is_told(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue("a b c d e f")
    answer = await openai.completions.create(model=BASE, prompt="p", max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("a b c", "length")


async def test_sampling_reaches_the_engine(openai: AsyncOpenAI, world: ApiWorld) -> None:
    await openai.chat.completions.create(
        model=BASE,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
        temperature=0.5,
        top_p=0.9,
        presence_penalty=-1,
        frequency_penalty=2,
        logit_bias={"17": -100},
        seed=-1,
        stop="END",
        max_tokens=7,
        user="somebody",
        extra_body={
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "min_tokens": 2,
            "speculation": 3,
        },
    )
    request = world.engine.requests[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 2, 1.2)
    assert params.logit_bias == {17: -100}
    assert params.seed == 2**64 - 1
    assert (params.stop, params.stop_token_ids, params.max_tokens, params.min_tokens) == (("END",), (3,), 7, 2)
    assert params.ignore_eos
    assert request.speculation == 3
    assert request.tenant == "demo"
    assert request.messages is not None
    assert [message.role for message in request.messages] == ["system", "user"]


async def test_a_seed_is_drawn_when_none_is_sent(openai: AsyncOpenAI, world: ApiWorld) -> None:
    for _ in range(2):
        await openai.completions.create(model=BASE, prompt="x")
    first, second = (request.params.seed for request in world.engine.requests)
    assert first != second


async def test_the_same_seed_gives_the_same_text(openai: AsyncOpenAI) -> None:
    texts = {(await openai.completions.create(model=BASE, prompt="x", seed=9)).choices[0].text for _ in range(3)}
    assert len(texts) == 1


async def test_text_parts_are_joined(openai: AsyncOpenAI, world: ApiWorld) -> None:
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]
    await openai.chat.completions.create(model=BASE, messages=[{"role": "user", "content": parts}])  # type: ignore[list-item,misc]
    assert world.engine.requests[0].messages is not None
    assert world.engine.requests[0].messages[0].content == "a b c"


async def test_an_answer_may_be_sent_back(openai: AsyncOpenAI, world: ApiWorld) -> None:
    first = await openai.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "hi"}])
    said = first.choices[0].message.model_dump()
    again = await openai.chat.completions.create(
        model=BASE,
        messages=[{"role": "user", "content": "hi"}, said, {"role": "user", "content": "go on"}],  # type: ignore[list-item]
    )
    assert again.choices[0].message.content


async def test_adapters_answer_under_their_name_and_version(openai: AsyncOpenAI, world: ApiWorld) -> None:
    version = await world.publish("sql")
    for model in ("sql", "sql@1", f"sql@{version.digest}"):
        answer = await openai.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}])
        assert answer.model == "sql@1"
    adapter = world.engine.requests[0].adapter
    assert adapter is not None
    assert (adapter.tenant, adapter.digest) == ("demo", version.digest)


async def test_the_base_answers_to_its_short_name(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model="base-1b", prompt="x")
    assert answer.model == BASE


async def test_models_are_listed(openai: AsyncOpenAI, world: ApiWorld) -> None:
    await world.publish("sql")
    await world.publish("theirs", tenant="other")
    models = {model.id: model async for model in openai.models.list()}
    assert set(models) == {BASE, "sql"}
    assert models["sql"].owned_by == "demo"
    assert (await openai.models.retrieve(BASE)).id == BASE
    assert (await openai.models.retrieve("sql@1")).id == "sql@1"


async def test_errors_are_openais(openai: AsyncOpenAI, world: ApiWorld) -> None:
    with pytest.raises(openai_package.NotFoundError) as missing:
        await openai.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    assert missing.value.request_id
    with pytest.raises(openai_package.BadRequestError) as wrong:
        await openai.completions.create(model=BASE, prompt="x", temperature=3)
    assert wrong.value.param == "temperature"
    world.engine.capacity = 0
    with pytest.raises(openai_package.RateLimitError) as full:
        await openai.completions.create(model=BASE, prompt="x")
    assert full.value.response.headers["retry-after"] == "2"


async def test_a_stream_that_breaks_raises_in_the_client(openai: AsyncOpenAI, world: ApiWorld) -> None:
    world.engine.enqueue(FakeAnswer(("a", " b", " c", " d"), fail_after=1))
    stream = await openai.completions.create(model=BASE, prompt="x", stream=True)
    assert (await anext(stream)).choices[0].text == "a"
    with pytest.raises(openai_package.APIError, match="on our side"):
        await anext(stream)


def test_parts_of_characters_keep_apart_and_have_no_text_yet() -> None:
    first, second = (TokenLogprob("\ufffd", number, -1.0, part) for number, part in enumerate((b"\xc3", b"\xa9")))
    after = TokenLogprob("!", 3, -1.0, b"!")
    scores = _logprobs([replace(first, top=(first, second)), second, after], _Shown("", 5))
    assert scores["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert scores["top_logprobs"][0] == {"bytes:\\xc3": -1.0, "bytes:\\xa9": -1.0}
    assert scores["text_offset"] == [5, 5, 6]
