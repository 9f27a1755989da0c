"""tokenizer.json as data: read, checked, its control tokens told from text, its tokens as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from benthic.errors import TextError


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def bytes_of(token: str) -> bytes:
    """The bytes that a token of the vocabulary stands for."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # outside the alphabet: a token that stands for its own spelling
        return token.encode()


def is_control(row: Mapping[str, Any]) -> bool:
    """DeepSeek flags its user and tool markers `special: false`; only runs of white space are ordinary text."""
    return bool(row.get("special")) or not str(row["content"]).isspace()


def text_only(definition: Mapping[str, Any]) -> dict[str, Any]:
    """The definition with every control token flagged special, which a backend can be told to leave unread."""
    rows = [{**row, "special": True} if is_control(row) else row for row in definition["added_tokens"]]
    return {**definition, "added_tokens": rows}


def spelling(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with `content`."""
    return value.get("content") if isinstance(value, Mapping) else value


def read_text(path: Path) -> str:
    """The text of one file, or TextError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read {path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of one file, or TextError."""
    return _object(read_text(path), str(path))


def parse(definition: str, origin: str) -> dict[str, Any]:
    """tokenizer.json as data. TextError when it is corrupt, something else, or not byte-level."""
    content = _object(definition, origin)
    if not isinstance(content.get("model"), dict):
        raise TextError(f"{origin} has no 'model'; it is not a tokenizer.json")
    decoder = content.get("decoder") or {}
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else [decoder]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise TextError(f"{origin}: decoder must be an object, or a sequence of them")
    kinds = [part.get("type") for part in parts]
    if "ByteLevel" not in kinds:
        raise TextError(f"{origin}: decoder {'+'.join(map(str, kinds))} is not supported; allowed: ByteLevel")
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise TextError(f"{origin}: every one of added_tokens needs an id and its content")
    # A file may carry truncation or padding from its last use; ids would be lost without a word.
    return {**content, "added_tokens": added, "truncation": None, "padding": None}


def _is_added_token(row: Any) -> bool:
    return isinstance(row, dict) and type(row.get("id")) is int and isinstance(row.get("content"), str)


def backend(definition: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    """What encodes; TextError for a definition `tokenizers` does not understand."""
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TextError(f"{origin} is not a tokenizer that `tokenizers` reads: {error}") from None


def _object(text: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise TextError(f"{origin} is not JSON: {error}", hint="download or copy the file again") from None
    if not isinstance(content, dict):
        raise TextError(f"{origin} holds a {type(content).__name__}, not a JSON object")
    return content
