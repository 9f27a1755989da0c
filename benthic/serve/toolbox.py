"""Toolbox: the tools of one request, and the grammars that make an answer call them or think before it keeps a form."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from benthic.config.serve import Limits
from benthic.errors import TextError
from benthic.serve.answer_parts import END_OF_THOUGHT
from benthic.serve.messages import Sampling
from benthic.serve.refusal import wrong
from benthic.serve.requests import AllowedTools, ChatRequest, NamedTool, Tool
from benthic.serve.sampling import Form, refuse_large_schema
from benthic.text import Tokenizer
from benthic.text.tool_format import ToolFormat, tool_format

_JSON = {"x-guidance": {"whitespace_pattern": r"( |\n {0,32})?"}}
_ANYTHING = r"/(.|\n)*/"
_ESCAPED = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
"""What would end a regular expression in Lark."""


@dataclass(frozen=True, slots=True)
class Toolbox:
    """`tools` are what the model is shown, `callable_` what it may call, and `format` is how; without one it calls
    nothing. It `must_call`, or is free to; `binds_calls` where its calls keep to a grammar even so."""

    tokenizer: Tokenizer
    tools: tuple[Tool, ...] = ()
    format: ToolFormat | None = None
    must_call: bool = False
    one_only: bool = False
    binds_calls: bool = False
    callable_: tuple[Tool, ...] = ()

    def bind(self, form: Form | None, thinks: bool) -> Form | None:
        """The form of the whole answer, a thought that is open included: calls where there must be some, what `form`
        says, or either; None where the answer is free."""
        if form is None and not (self.must_call or self.binds_calls):
            return None
        if form is not None and not thinks and self.format is None:
            return form
        thought = f"{self._thought} " if thinks else ""
        if self.must_call:
            answer, rules = "section", []
        elif form is None:
            answer, rules = "anything section?", []
        else:
            answer, rules = "body" if self.format is None else "(body | section)", [f"body: {_body(form)}"]
        rules = [f"start: {thought}{answer}", *rules, *(self._section() if self.format is not None else ())]
        rules += [f"anything: {_ANYTHING}"] if form is None or thinks else []
        return Form("grammar", "\n".join(rules) + "\n", "tools" if form is None else form.param)

    @property
    def tells_calls_from_text(self) -> bool:
        """Whether free text cannot spell what begins a call."""
        format_ = self.format
        return format_ is not None and all(
            self._mark(mark).startswith("<[") for mark in (format_.begin, format_.call_begin)
        )

    def ending(self, sampling: Sampling) -> Sampling:
        """An answer of one call at most ends with it."""
        if not self.one_only or self.format is None:
            return sampling
        return msgspec.structs.replace(sampling, stop=(*sampling.stop, self.format.call_end))

    @property
    def _thought(self) -> str:
        return f"anything {self._mark(END_OF_THOUGHT)} /\\s{{0,4}}/"

    def _section(self) -> list[str]:
        """Lark: one call or several of the tools that may be called, their arguments by their schemas."""
        format_ = self.format
        assert format_ is not None
        between = f"{self._text(format_.between)} " if format_.between else ""
        rules = [
            f"section: {self._mark(format_.begin)} calls {self._mark(format_.end)}",
            "calls: call" if self.one_only else f"calls: call ({between}call)*",
            "call: " + " | ".join(f"call_{place}" for place in range(len(self.callable_))),
        ]
        for place, tool in enumerate(self.callable_):
            schema = tool.function.parameters if self.must_call or tool.function.strict else None
            header = self._text(format_.header(tool.function.name, 0).removesuffix("0"))
            number = "/[0-9]{1,3}/ " if format_.numbers else ""
            parts = (self._mark(format_.call_begin), header, number + self._text(format_.opening))
            rules.append(f"call_{place}: {' '.join(parts)} arguments_{place} {self._text(format_.closings[0])}")
            rules.append(f"arguments_{place}: %json {json.dumps(_JSON | (schema or {'type': 'object'}))}")
        return rules

    def _text(self, text: str) -> str:
        """Lark for text with control tokens in it."""
        pieces, rest = [], text
        for token in sorted((one for one in _MARKS if one in text), key=text.find):
            before, _, rest = rest.partition(token)
            pieces += [json.dumps(before, ensure_ascii=False)] if before else []
            pieces.append(self._mark(token))
        pieces += [json.dumps(rest, ensure_ascii=False)] if rest else []
        return " ".join(pieces)

    def _mark(self, token: str) -> str:
        """Lark for a control token, which plain text cannot be taken for; for its spelling where there is none."""
        try:
            number = self.tokenizer.token_id(token)
        except TextError:
            return json.dumps(token, ensure_ascii=False)
        return f"<[{number}]>" if number in self.tokenizer.control_ids else json.dumps(token, ensure_ascii=False)


_MARKS = tuple(f"<｜tool▁{one}｜>" for one in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")) + tuple(
    f"<|tool_{one}|>"
    for one in ("calls_section_begin", "calls_section_end", "call_begin", "call_end", "call_argument_begin")
)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a request says of its tools: whether one must be called, which of them may be (None: all), and whether at
    most one."""

    mode: Literal["none", "auto", "required"] | None = None
    names: tuple[str, ...] | None = None
    one_only: bool = False


def choice_of(asked: ChatRequest) -> Choice:
    """What a chat says."""
    one_only = asked.parallel_tool_calls is False
    match asked.tool_choice:
        case NamedTool(function=function):
            return Choice("required", (function.name,), one_only=True)
        case AllowedTools(allowed_tools=allowed):
            return Choice(allowed.mode, tuple(tool.function.name for tool in allowed.tools), one_only)
        case mode:
            return Choice(mode, None, one_only)


def toolbox_of(tools: Sequence[Tool], choice: Choice, tokenizer: Tokenizer, limits: Limits) -> Toolbox:
    """The tools of a request, and its choice among them. Raises Refusal 400."""
    tools = tuple(tools)
    if not tools:
        if choice.mode not in (None, "none", "auto") or choice.names is not None:
            raise wrong("tool_choice needs tools", "tool_choice", "invalid_value")
        return Toolbox(tokenizer)
    _check(tools, limits)
    known = {tool.function.name for tool in tools}
    strange = next((name for name in choice.names or () if name not in known), None)
    if strange is not None:
        raise wrong(f"tool_choice names {strange!r}, which is not one of tools", "tool_choice", "invalid_value")
    callable_ = tuple(tool for tool in tools if choice.names is None or tool.function.name in choice.names)
    format_ = tool_format(tokenizer.templates.get("default", ""))
    if format_ is None:
        raise wrong("the chat template of this model takes no tools", "tools", "unsupported_parameter")
    if choice.mode == "none":
        return Toolbox(tokenizer)
    must_call = choice.mode == "required"
    binds_calls = choice.names is not None or any(tool.function.strict for tool in tools)
    toolbox = Toolbox(tokenizer, tools, format_, must_call, choice.one_only, binds_calls, callable_)
    if binds_calls and not must_call and not toolbox.tells_calls_from_text:
        raise wrong(
            "strict tools and allowed_tools are kept only where a tool must be called, as this model's tokenizer has "
            "no token that begins a call: set tool_choice to required or to a function",
            "tools",
            "unsupported_parameter",
        )
    return toolbox


def _check(tools: tuple[Tool, ...], limits: Limits) -> None:
    if len(tools) > limits.tools:
        raise wrong(f"{len(tools)} tools are given; at most {limits.tools} are allowed", "tools", "invalid_value")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise wrong("two tools have the same name", "tools", "invalid_value")
    for place, tool in enumerate(tools):
        if tool.function.parameters is not None:
            refuse_large_schema(tool.function.parameters, f"tools.{place}", limits)


def _body(form: Form) -> str:
    """Lark for a form that is a part of an answer."""
    match form.kind:
        case "json_schema":
            return f"%json {json.dumps(_JSON | _as_object(form.text))}"
        case "regex":
            escaped = re.sub(r"(?s)\\.|/|\n", lambda found: _ESCAPED.get(found[0], found[0]), form.text)
            return f"/{escaped}/"
    raise wrong(f"{form.param} goes neither with a thought nor with tools", form.param, "unsupported_parameter")


def _as_object(text: str) -> dict[str, Any]:
    schema = json.loads(text)
    return schema if isinstance(schema, dict) else {"allOf": [schema]}
