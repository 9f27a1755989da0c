"""Compiles forms in a process of its own, which may be killed: `python -m benthic.serve.form_process`.

A schema can be small and take for ever. What this process accepted in time, the engine may compile too.
"""

from __future__ import annotations

import resource
import sys
from typing import BinaryIO

import msgspec

MEMORY_BYTES = 2 * 2**30
LENGTH_BYTES = 4


class Question(msgspec.Struct, frozen=True):
    """A form: one of json_schema, regex and grammar."""

    kind: str
    text: str


class Verdict(msgspec.Struct, frozen=True):
    """Why it cannot be used; empty where it can."""

    reason: str


def framed(message: Question | Verdict) -> bytes:
    """A message with its length in front."""
    content = msgspec.msgpack.encode(message)
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def judge(question: Question) -> Verdict:
    """Compile it without a vocabulary."""
    try:
        import llguidance
    except ImportError:
        return Verdict("forms need llguidance, which this server does not have: pip install 'benthic[serve]'")
    make = {
        "json_schema": llguidance.LLMatcher.grammar_from_json_schema,
        "regex": llguidance.LLMatcher.grammar_from_regex,
        "grammar": llguidance.LLMatcher.grammar_from_lark,
    }[question.kind]
    try:
        return Verdict(llguidance.LLMatcher.validate_grammar(make(question.text)))
    except ValueError as error:
        return Verdict(str(error) or "it is not valid")


def main(questions: BinaryIO, verdicts: BinaryIO) -> None:
    """Answer until nobody asks any more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    while head := questions.read(LENGTH_BYTES):
        question = msgspec.msgpack.decode(questions.read(int.from_bytes(head, "big")), type=Question)
        verdicts.write(framed(judge(question)))
        verdicts.flush()


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
