"""Question: a conversation that wants an answer, whichever endpoint it came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request

from benthic.serve.answer_parts import thought_is_open
from benthic.serve.conversation import prompt_of, refuse_many
from benthic.serve.event_stream import while_connected
from benthic.serve.generation import Generation
from benthic.serve.messages import Sampling
from benthic.serve.refusal import wrong
from benthic.serve.requests import Drawing, Message
from benthic.serve.sampling import Form, sampling_of
from benthic.serve.service import Service, salt_of
from benthic.serve.toolbox import Toolbox


class Question(NamedTuple):
    """`messages` came in parameter `param`; `thinking` are the template's variables for it."""

    messages: Sequence[Message]
    param: str
    toolbox: Toolbox
    form: Form | None
    thinking: dict[str, bool]


class Begun(NamedTuple):
    """An answer on its way, which the caller ends."""

    prompt: list[int]
    sampling: Sampling
    generation: Generation


async def begin(request: Request, service: Service, asked: Drawing, question: Question, answers: int = 1) -> Begun:
    """Hand the question to the engine. Raises Refusal."""
    limits, toolbox, form = service.config.limits, question.toolbox, question.form
    refuse_many(question.messages, limits.messages, question.param)
    if form is not None and toolbox.must_call:
        raise wrong("an answer that must call a tool cannot be bound to another form", form.param, "invalid_value")
    ready = service.require(answers)
    reading = prompt_of(service.tokenizer, question.messages, toolbox.tools, param=question.param, **question.thinking)
    prompt = await while_connected(request, reading)
    form = toolbox.bind(form, thought_is_open(service.tokenizer, prompt))
    sampling = toolbox.ending(sampling_of(asked, len(prompt), ready, limits, form))
    if form is not None:
        await while_connected(request, service.forms.check(form))
    generation = await service.begin(request, [prompt], [sampling], salt_of(request, asked.cache_salt))
    return Begun(prompt, sampling, generation)
