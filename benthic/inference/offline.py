"""A file of prompts to a file of answers: JSON lines in, JSON lines out, in the same order.

Answers are appended to `.NAME.partial` beside the output as they come, so that an interrupted run loses none: the next
one goes on where it was. The output itself appears once it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from benthic.errors import ConfigError, DataError, RequestError, RunError, TextError
from benthic.files import atomic_file, write_failure
from benthic.inference.completion import Completion
from benthic.inference.engine import Engine
from benthic.log import logger
from benthic.model.sampling import SamplingParams

_SECONDS_BETWEEN_NEWS = 10
_KEYS = ("prompt", "token_ids", "messages")


def answer_file(engine: Engine, source: Path, output: Path, params: SamplingParams) -> dict[str, Any]:
    """Answer every line of `source`; how many there were, how many failed, and their tokens.

    A line is an object with `prompt` (text), `token_ids` or `messages` (a conversation), and perhaps `params`, which
    change those given here. A line that cannot be served gets an `error` in place of `completions`. Raises DataError
    for a line that is no such object, and RunError where `output` exists or another input's answers are beside it.
    """
    if output.exists():
        raise RunError(f"{output} exists already", hint="choose another --output, or remove it")
    lines = _read(source)
    partial = output.with_name(f".{output.name}.partial")
    heading = {"input": hashlib.sha256(source.read_bytes()).hexdigest(), "params": params.model_dump(mode="json")}
    known = _resume(partial, heading)
    if known:
        logger.info("offline: %d of %d answers are there from before", len(known), len(lines))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            if not file.tell():
                _append(file, heading)
            for row in _answers(engine, lines, params, known):
                _append(file, row)
                known[row["index"]] = row
    except OSError as error:
        raise write_failure(partial, error) from None
    with atomic_file(output) as file:
        for index in range(len(lines)):
            file.write(_encoded(known[index]))
    partial.unlink()
    failed = sum("error" in row for row in known.values())
    tokens = sum(len(one["token_ids"]) for row in known.values() for one in row.get("completions", ()))
    return {"answered": len(lines) - failed, "failed": failed, "completion_tokens": tokens}


def _answers(
    engine: Engine, lines: list[dict[str, Any]], params: SamplingParams, known: dict[int, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of all lines not `known`, as they become complete; never more in the engine than it can start."""
    todo = iter([index for index in range(len(lines)) if index not in known])
    owners: dict[int, int] = {}
    parts: dict[int, list[Completion]] = {}
    done, begun, drawn = len(known), time.monotonic(), 0
    told = begun
    while True:
        while len(engine.scheduler.waiting) < engine.settings.max_sequences and (index := next(todo, None)) is not None:
            try:
                ids = _add(engine, lines[index], params)
            except (ConfigError, RequestError, TextError) as error:
                done += 1
                yield {"index": index, "error": str(error)}
                continue
            owners |= dict.fromkeys(ids, index)
            parts[index] = []
        if not owners:
            return
        for event in engine.step():
            drawn += len(event.token_ids)
            if event.completion.finish_reason is None or event.request_id not in owners:
                continue
            index = owners.pop(event.request_id)
            parts[index].append(event.completion)
            if index not in owners.values():
                done += 1
                yield _row(index, parts.pop(index))
        if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
            told = time.monotonic()
            logger.info("offline: %d of %d answers, %.0f tokens/s", done, len(lines), drawn / (told - begun))


def _add(engine: Engine, line: dict[str, Any], params: SamplingParams) -> list[int]:
    changes = line.get("params", {})
    if not isinstance(changes, dict):
        raise RequestError(f"params must be an object, not {changes!r}")
    params = params.replace(**changes) if changes else params
    if "messages" in line:
        if engine.tokenizer is None:
            raise RequestError("messages need a tokenizer with a chat template")
        prompt = engine.tokenizer.encode_chat(line["messages"], add_generation_prompt=True)
    else:
        prompt = line.get("prompt", line.get("token_ids"))
    return engine.add_request(prompt, params)


def _row(index: int, completions: list[Completion]) -> dict[str, Any]:
    completions.sort(key=lambda one: one.index)
    fields = (
        "text",
        "token_ids",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "finish_reason",
        "stop_reason",
        "error",
    )
    shown = [{name: value for name in fields if (value := getattr(one, name)) is not None} for one in completions]
    return {"index": index, "prompt_tokens": len(completions[0].prompt_token_ids), "completions": shown}


def _read(source: Path) -> list[dict[str, Any]]:
    try:
        # Not splitlines: JSON strings may hold U+2028 and others of what Unicode calls the end of a line.
        texts = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {source}: {error}") from None
    rows: list[dict[str, Any]] = []
    if texts == [""]:
        return rows
    for number, text in enumerate(texts, 1):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise DataError(f"line {number} of {source} is not JSON: {error}") from None
        if not isinstance(row, dict) or sum(name in row for name in _KEYS) != 1:
            raise DataError(
                f"line {number} of {source} must be an object with one of {', '.join(_KEYS)}",
                hint='for example {"prompt": "def add("}',
            )
        rows.append(row)
    return rows


def _resume(partial: Path, heading: dict[str, Any]) -> dict[int, Any]:
    """The rows that a run before this one has written; a line it was cut off in is dropped."""
    if not partial.is_file():
        return {}
    whole, _, cut = partial.read_bytes().rpartition(b"\n")
    if cut:
        os.truncate(partial, len(whole) + 1 if whole else 0)
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        known = {row["index"]: row for row in rows[1:]}
    except (ValueError, KeyError, TypeError):
        rows, known = [None], {}
    if rows and rows[0] != heading:
        raise RunError(
            f"{partial} holds answers to another input, or with other settings",
            hint="remove it to begin anew, or give the same input and settings to go on",
        )
    return known


def _append(file: BinaryIO, row: dict[str, Any]) -> None:
    file.write(_encoded(row))
    file.flush()
    os.fsync(file.fileno())


def _encoded(row: dict[str, Any]) -> bytes:
    # Half of a surrogate pair, which only an escape can say, stays an escape.
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
