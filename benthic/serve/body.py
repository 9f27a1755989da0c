"""The body of a request: read within bounds of size, time and depth, and strictly JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from benthic.config.serve import Limits
from benthic.errors import did_you_mean
from benthic.serve.refusal import Refusal, wrong

M = TypeVar("M", bound=BaseModel)
MOST_FAULTS = 1000
"""Beyond these none is told: to look for the deepest takes a kilobyte each."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The bytes. Raises Refusal 415, 413, 408, and 400 where they break off."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"content-type is {kind[:100]!r}; send application/json")
    announced = request.headers.get("content-length", "0")
    if not announced.isdecimal() or int(announced[:20]) > limits.body_bytes:
        raise _too_long(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            return await _collect(request, limits)
    except TimeoutError:
        raise Refusal(
            408, f"the body took longer than {limits.body_seconds:g} s", "timeout_error", code="slow_body"
        ) from None
    except ClientDisconnect:  # also chunks of a size that is none; granian would make it a 500 of plain text
        raise wrong("the body broke off before its end", code="broken_body") from None


async def _collect(request: Request, limits: Limits) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > limits.body_bytes:
            raise _too_long(limits)
    return bytes(content)


def _too_long(limits: Limits) -> Refusal:
    return Refusal(413, f"the body is too long; at most {limits.body_bytes} bytes are allowed", code="body_too_large")


def parse(content: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object that `content` is. Raises Refusal 400."""
    try:
        value = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_a_number, parse_float=_number
        )
    except UnicodeDecodeError:
        raise wrong("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise _too_deep(limits) from None
    except ValueError as error:  # also numbers of thousands of digits
        raise wrong(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise wrong(f"the body is a JSON {_NAMES[type(value)]}; an object is needed", code="invalid_json")
    if depth_of(value, limits.json_depth) > limits.json_depth:
        raise _too_deep(limits)
    if b"\\ud" in content.lower():
        _refuse_half_characters(value)
    return value


def _refuse_half_characters(value: dict[str, Any]) -> None:
    """JSON can spell one half of a surrogate pair; no text has it, and nothing behind this could write it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise wrong("the body has half of a surrogate pair, which is no character", code="invalid_json") from None


def validated(value: dict[str, Any], model: type[M]) -> M:
    """`value` as a `model`. Raises Refusal 400 with the name of the first field that is wrong, or that nobody knows."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MOST_FAULTS:
            raise wrong(f"the body has {error.error_count()} faults", code="invalid_value") from None
        # A value of several allowed shapes fails once for each; the deepest place is the one that was meant.
        first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(_place(one["loc"])))
    place = ".".join(_place(first["loc"]))[:100]
    if first["type"] == "extra_forbidden":
        place = ".".join([*_place(first["loc"][:-1]), str(first["loc"][-1])])[:100]
        hint = did_you_mean(str(first["loc"][-1])[:100], model.model_fields) if len(first["loc"]) == 1 else ""
        raise wrong(f"unknown or unsupported parameter {place!r}; {hint}", place, "unknown_parameter")
    given = f" (given {str(first['input'])[:100]!r})" if isinstance(first["input"], str | int | float | bool) else ""
    raise wrong(f"{place}: {first['msg'].removeprefix('Value error, ')}{given}", place or None, "invalid_value")


def depth_of(value: Any, most: int) -> int:
    """How deep lists and objects are nested in JSON data; counts no further than one more than `most`."""
    level, depth = [value], 0
    while depth <= most:
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            break
        depth += 1
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return depth


def _place(location: tuple[int | str, ...]) -> list[str]:
    """The names and indices of a place; pydantic also names the type it tried there."""
    return [str(part) for part in location if isinstance(part, int) or (part.islower() and not _TYPE.fullmatch(part))]


def _too_deep(limits: Limits) -> Refusal:
    return wrong(f"the body is nested more than {limits.json_depth} deep", code="invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, value in pairs:
        if name in known:
            raise ValueError(f"{name[:100]!r} is there twice")
        known[name] = value
    return known


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _number(text: str) -> float | int:
    """JSON knows numbers only, and some clients write 16 as 16.0; above 2^53 a float does not say which integer."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:100]} is too large for a number")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
_TYPE = re.compile(r"(constrained-)?(str|int|float|bool|none)|\w+\[.*\]")
