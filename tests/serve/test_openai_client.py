"""OpenAI's client, with strict validation of answers, gets what it expects."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from benthic.inference.engine import Engine
from benthic.model.sampling import SamplingParams

HELLO = [{"role": "user", "content": "def add"}]


def chat(client, **options):
    return client.chat.completions.create(model="tiny", messages=HELLO, **({"max_tokens": 12} | options))


def test_a_chat_answers_what_the_engine_answers(client, folder):
    engine = Engine(folder)
    prompt = engine.tokenizer.encode_chat(HELLO, add_generation_prompt=True)
    (wanted,) = engine.generate([prompt], SamplingParams(max_tokens=12, seed=3))
    answer = chat(client, seed=3)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["e", "r"]}])
def test_a_streamed_chat_is_the_whole_one(client, options):
    whole = chat(client, seed=5, max_tokens=30, **options)
    texts = [""] * len(whole.choices)
    reasons = [None] * len(whole.choices)
    tokens = [[] for _ in whole.choices]
    usages = []
    for chunk in chat(client, seed=5, max_tokens=30, stream=True, stream_options={"include_usage": True}, **options):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usages[-1] == whole.usage
    assert not any(usages[:-1])
    if "logprobs" in options:
        assert [one.token for one in tokens[0]] == [one.token for one in whole.choices[0].logprobs.content]


def test_the_bytes_of_logprobs_are_the_text_even_where_tokens_cut_characters(client):
    choice = chat(client, seed=7, max_tokens=40, logprobs=True, top_logprobs=3).choices[0]
    assert (
        b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode(errors="replace") == choice.message.content
    )
    for one in choice.logprobs.content:
        assert len(one.top_logprobs) == 3
        assert one.top_logprobs[0].logprob >= one.logprob - 1e-5


def test_stop_penalties_bias_and_token_limits_are_honoured(client):
    forced = chat(client, logit_bias={"100": 100}, temperature=0, max_completion_tokens=4, max_tokens=openai.NOT_GIVEN)
    assert forced.usage.completion_tokens == 4
    assert len(set(forced.choices[0].message.content)) == 1
    penalised = chat(
        client, logit_bias={"100": 100}, presence_penalty=2, frequency_penalty=2, temperature=0, max_tokens=80
    )
    assert penalised.usage.completion_tokens == 80
    greedy = chat(client, temperature=0).choices[0].message.content
    assert chat(client, extra_body={"top_k": 1}).choices[0].message.content == greedy
    stop = greedy[2:4]
    stopped = chat(client, temperature=0, stop=stop).choices[0]
    assert stopped.message.content == greedy[: greedy.find(stop)]
    assert stopped.finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_bound_to_a_schema_is_valid(client, temperature):
    format_ = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=format_, temperature=temperature, max_tokens=200, seed=1)
    value = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert set(value) == {"name", "age"}
    assert 0 <= value["age"] <= 99


def test_other_forms_bind_too(client):
    answer = chat(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")
    answer = chat(client, extra_body={"structured_outputs": {"regex": "[0-9]{3}"}})
    assert answer.choices[0].message.content.isdigit()
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=300, logit_bias={"98": 8}, seed=2)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_plain_completions_of_several_prompts(client, folder):
    engine = Engine(folder)
    wanted = engine.generate(["def", "ret", "add"], SamplingParams(max_tokens=6, temperature=0))
    answer = client.completions.create(model="tiny", prompt=["def", "ret", "add"], max_tokens=6, temperature=0)
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    ids = [list(engine.tokenizer.encode(text, add_bos=True)) for text in ("def", "ret")]
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0, n=2)
    assert [choice.text for choice in answer.choices] == [one.text for one in wanted[:2] for _ in range(2)]


def test_an_echo_with_logprobs_is_what_evaluation_reads(lenient, folder):
    engine = Engine(folder)
    (wanted,) = engine.generate(["def add(first"], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    answer = lenient.completions.create(
        model="tiny", prompt="def add(first", max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    choice = answer.choices[0]
    assert choice.text == "def add(first" + wanted.text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(wanted.prompt_logprobs[1:], abs=1e-4)
    assert len(choice.logprobs.tokens) == len(wanted.prompt_token_ids) + 1
    assert choice.logprobs.text_offset[-1] == len("def add(first")


def test_a_streamed_completion_is_the_whole_one(lenient):
    options = {"model": "tiny", "prompt": ["def", "add"], "max_tokens": 20, "seed": 4, "logprobs": 1, "echo": True}
    whole = lenient.completions.create(**options)
    texts, tokens = ["", ""], [[], []]
    for chunk in lenient.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]


def test_models_and_what_this_server_has_not(client):
    (model,) = client.models.list().data
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match="makes no embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_sixty_four_requests_at_once_each_get_their_own_answer(client, server):
    alone = {seed: chat(client, seed=seed, max_tokens=24).choices[0].message.content for seed in range(8)}

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as many:

            async def one(seed):
                text = ""
                stream = await many.chat.completions.create(
                    model="tiny", messages=HELLO, seed=seed, max_tokens=24, stream=True
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(seed % 8) for seed in range(64)))

    assert asyncio.run(all_at_once()) == [alone[seed % 8] for seed in range(64)]
