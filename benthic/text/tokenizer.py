"""Tokenizer: text to ids and back, byte-level BPE run by `tokenizers`.

Reads the folder layout every DeepSeek release uses (tokenizer.json, tokenizer_config.json, chat_template.jinja) and
writes it so that transformers' AutoTokenizer loads it. Text is never trusted: `encode` gives the ids of control tokens
(bos, user markers, think tags ...) only where it is asked to; what a user types stays plain text, whatever it spells.
Training lives in `training.py`, streaming in `detokenizer.py`, templates in `chat_template.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers

from benthic.errors import TextError, did_you_mean
from benthic.files import write_atomic
from benthic.text.chat_template import MARK, ChatTemplate, load_templates

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


class Tokenizer:
    """One vocabulary with its special tokens and chat templates; immutable and safe to share between threads."""

    def __init__(
        self,
        definition: str,
        config: Mapping[str, Any] | None = None,
        templates: Mapping[str, str] | None = None,
        origin: str = "tokenizer",
    ) -> None:
        """`definition` is the text of tokenizer.json, `config` the content of tokenizer_config.json."""
        self.origin = origin
        self.config = dict(config or {})
        self.templates = dict(templates or {})
        self._definition = definition
        self._json = _parse(definition, origin)
        self._control = {str(row["content"]): int(row["id"]) for row in self._json["added_tokens"] if _is_control(row)}
        self._plain = _backend(_without_control(self._json), origin)
        self._plain.encode_special_tokens = True
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token")
        flagged = {row["id"] for row in self._json["added_tokens"] if row.get("special")}
        named = {one for one in (self.bos_id, self.eos_id, self.pad_id) if one is not None}
        self.special_ids: frozenset[int] = frozenset(flagged | named)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Load a published tokenizer folder. Raises TextError for a missing, unreadable or corrupt file."""
        folder = Path(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            found = ", ".join(sorted(one.name for one in folder.glob("*token*"))[:5]) if folder.is_dir() else ""
            raise TextError(
                f"no {TOKENIZER_FILE} in {folder}" + (f" (found {found})" if found else ""),
                hint="point to a folder with a tokenizer.json; other formats can be converted with transformers",
            )
        config_path = folder / CONFIG_FILE
        config = _read_json(config_path) if config_path.exists() else {}
        template_path = folder / TEMPLATE_FILE
        template = _read(template_path) if template_path.exists() else None
        return cls(_read(path), config, load_templates(template, config, str(config_path)), str(path))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each whole or not at all."""
        folder = Path(folder)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        if len(self.templates) > 1:
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        elif self.templates:
            write_atomic(folder / TEMPLATE_FILE, next(iter(self.templates.values())), TextError)
        write_atomic(folder / TOKENIZER_FILE, self._definition, TextError)
        write_atomic(folder / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2) + "\n", TextError)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows, never fewer."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids of a text: the vocabulary file and the special ids."""
        ids = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        return hashlib.sha256(f"{self._definition}\n{ids}".encode()).hexdigest()

    @cached_property
    def add_bos_token(self) -> bool:
        """Whether this tokenizer's makers put BOS before a plain prompt."""
        if "add_bos_token" in self.config:
            return bool(self.config["add_bos_token"])
        return self.bos_id is not None and self._markup.encode("").ids[:1] == [self.bos_id]

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Ids of fill-in-the-middle's begin, hole and end."""
        return self.token_id(FIM_BEGIN), self.token_id(FIM_HOLE), self.token_id(FIM_END)

    def token_id(self, token: str) -> int:
        """The id of one token by its exact spelling, or TextError with the nearest control token."""
        found = self._plain.token_to_id(token)
        if found is None:
            raise TextError(f"no token {token!r} in {self.origin}", hint=did_you_mean(token, self._control))
        return found

    def encode(self, text: str, add_bos: bool = False, parse_control: bool = False) -> list[int]:
        """Ids of `text`; spellings of control tokens are plain text unless `parse_control`."""
        backend = self._markup if parse_control else self._plain
        return self._bos(add_bos) + self._run(backend, [text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, in parallel on the machine's cores."""
        return self._run(self._plain, texts)

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`, invalid UTF-8 as U+FFFD; ids past the vocabulary (padded embedding rows) are empty."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes that `ids` stand for."""
        table, size, skipped = self._bytes, len(self._bytes), self.special_ids if skip_special else frozenset()
        kept = [one for one in ids if one not in skipped]
        if min(kept, default=0) < 0:
            raise TextError(f"token id {min(kept)} is negative")
        return b"".join([table[one] for one in kept if one < size])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id past the vocabulary."""
        return self.decode_bytes([token_id])

    def chat_template(self, name: str = "default") -> ChatTemplate:
        """The named chat template, compiled; TextError when this tokenizer has none of that name."""
        if not self.templates:
            raise TextError(
                f"{self.origin} has no chat template", hint=f"put a {TEMPLATE_FILE} beside it or send a plain prompt"
            )
        if name not in self.templates:
            raise TextError(f"no chat template {name!r} in {self.origin}", hint=did_you_mean(name, self.templates))
        if name not in self._compiled:
            self._compiled[name] = ChatTemplate(self.templates[name], self.origin)
        return self._compiled[name]

    def render_chat(self, messages: Sequence[Mapping[str, Any]], name: str = "default", **variables: Any) -> str:
        """The text of a conversation; `variables` are the template's (add_generation_prompt, tools, thinking ...)."""
        return self.chat_template(name).render(messages, self._token_names, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], name: str = "default", **variables: Any) -> list[int]:
        """Ids of a conversation. Control tokens come from the template alone: what messages spell stays text."""
        rendered = self.chat_template(name).render(messages, self._token_names, self._control_pattern, **variables)
        if MARK not in rendered:
            return self._run(self._markup, [rendered])[0]
        # Somebody wrote a control token's spelling into a message: the marks around it say that it is text.
        marked = re.compile(f"{MARK}({self._control_pattern.pattern}){MARK}|{MARK}")
        ids: list[int] = []
        for index, part in enumerate(marked.split(rendered)):
            ids += self.encode(part or "", parse_control=index % 2 == 0)
        return ids

    def _bos(self, wanted: bool) -> list[int]:
        if not wanted:
            return []
        if self.bos_id is None:
            raise TextError(f"{self.origin} names no bos_token", hint=f"name it in {CONFIG_FILE} or leave add_bos out")
        return [self.bos_id]

    def _run(self, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TextError(f"text that cannot be encoded as UTF-8: {error}") from None
        return [one.ids for one in encoded]

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        """The backend that turns spellings of control tokens into their ids."""
        return _backend(self._json, self.origin)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _compiled(self) -> dict[str, ChatTemplate]:
        return {}

    @cached_property
    def _token_names(self) -> dict[str, str]:
        names = [name for name in self.config if name.endswith("_token") and not name.startswith("add_")]
        return {name: text for name in names if (text := _spelling(self.config[name])) is not None}

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {row["id"]: str(row["content"]).encode() for row in self._json["added_tokens"]}
        table = [b""] * self.vocab_size
        for token, index in self._plain.get_vocab(with_added_tokens=True).items():
            table[index] = added[index] if index in added else _bytes_of(token)
        return table

    def _named_id(self, name: str) -> int | None:
        spelling = _spelling(self.config.get(name))
        if spelling is None:
            return None
        found = self._plain.token_to_id(spelling)
        if found is None:
            raise TextError(
                f"{name} {spelling!r} is not in the vocabulary of {self.origin}",
                hint=did_you_mean(spelling, self._control),
            )
        return found


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted: printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # outside the alphabet: a token that stands for its own spelling
        return token.encode()


def _is_control(row: Mapping[str, Any]) -> bool:
    """DeepSeek flags its user and tool markers `special: false`; only runs of white space are ordinary text."""
    return bool(row.get("special")) or not str(row["content"]).isspace()


def _without_control(definition: Mapping[str, Any]) -> dict[str, Any]:
    rows = [{**row, "special": True} if _is_control(row) else row for row in definition["added_tokens"]]
    return {**definition, "added_tokens": rows}


def _spelling(value: Any) -> str | None:
    """A special token in tokenizer_config.json is a string or an object with `content`."""
    return value.get("content") if isinstance(value, Mapping) else value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read {path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise TextError(f"{path} is not JSON: {error}", hint="download or copy the file again") from None
    if not isinstance(content, dict):
        raise TextError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _parse(definition: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(definition)
    except json.JSONDecodeError as error:
        raise TextError(f"{origin} is not JSON: {error}", hint="download or copy the file again") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise TextError(f"{origin} has no 'model'; it is not a tokenizer.json")
    decoder = content.get("decoder") or {}
    kinds = [part.get("type") for part in decoder.get("decoders", [decoder])]
    if "ByteLevel" not in kinds:
        raise TextError(f"{origin}: decoder {'+'.join(map(str, kinds))} is not supported; allowed: ByteLevel")
    # A file may carry truncation or padding from its last use; ids would be lost without a word.
    return {**content, "added_tokens": content.get("added_tokens") or [], "truncation": None, "padding": None}


def _backend(definition: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises nothing narrower
        raise TextError(f"{origin} is not a tokenizer that `tokenizers` reads: {error}") from None
