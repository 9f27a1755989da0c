"""The items of a response's input become the messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from benthic.serve.requests import CalledFunction, Function, Message, TextPart, Tool, ToolCall
from benthic.serve.response_requests import (
    AllowedFunctions,
    FunctionCall,
    FunctionCallOutput,
    FunctionTool,
    InputItem,
    InputMessage,
    InputText,
    NamedFunction,
    ResponsesRequest,
    Thought,
)
from benthic.serve.toolbox import Choice


def messages_of(asked: ResponsesRequest) -> list[Message]:
    """The conversation, its instructions first. What the model thought, said and called in a row is one message."""
    found = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    if isinstance(asked.input, str):
        return [*found, Message(role="user", content=asked.input)]
    turn: list[InputItem] = []
    for item in asked.input:
        if turn and not _goes_on(turn[-1], item):
            found.append(_message(turn))
            turn = []
        turn.append(item)
    return [*found, _message(turn)]


def tools_of(given: Sequence[FunctionTool]) -> list[Tool]:
    """Tools as chats name them."""
    return [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)))
        for tool in given
    ]


def choice_of_response(asked: ResponsesRequest) -> Choice:
    """What a request says of its tools."""
    one_only = asked.parallel_tool_calls is False
    match asked.tool_choice:
        case NamedFunction(name=name):
            return Choice("required", (name,), one_only=True)
        case AllowedFunctions(mode=mode, tools=tools):
            return Choice(mode, tuple(tool.name for tool in tools), one_only)
        case mode:
            return Choice(mode, None, one_only)


def _goes_on(before: InputItem, item: InputItem) -> bool:
    """Whether an item belongs to the same message of the model's."""
    match before, item:
        case Thought(), (InputMessage(role="assistant") | FunctionCall()):
            return True
        case ((InputMessage(role="assistant") | FunctionCall()), FunctionCall()):
            return True
    return False


def _message(turn: Sequence[InputItem]) -> Message:
    match turn[0]:
        case FunctionCallOutput(call_id=call, output=output):
            return Message(role="tool", tool_call_id=call, content=_content(output))
        case InputMessage(role=role, content=content) if role != "assistant":
            return Message(role=role, content=_content(content))
    return _answer(turn)


def _answer(turn: Sequence[InputItem]) -> Message:
    content, thought, calls = None, None, []
    for item in turn:
        match item:
            case Thought():
                thought = "".join(part.text for part in item.content or ())
            case InputMessage():
                content = _content(item.content)
            case FunctionCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                calls.append(ToolCall(id=item.call_id, type="function", function=function))
    return Message(
        role="assistant",
        content="" if content is None and not calls else content,
        reasoning_content=thought or None,
        tool_calls=calls or None,
    )


def _content(given: str | list[InputText]) -> str | list[TextPart]:
    return given if isinstance(given, str) else [TextPart(type="text", text=part.text) for part in given]
