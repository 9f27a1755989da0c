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
from benthic.text.definition import backend, bytes_of, is_control, parse, read_json, read_text, spelling, text_only

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
        self.definition = definition
        self._compiled: dict[str, ChatTemplate] = {}
        self._json = parse(definition, origin)
        self._control = {str(row["content"]): int(row["id"]) for row in self._json["added_tokens"] if is_control(row)}
        self._plain = backend(text_only(self._json), origin)
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
        config = read_json(config_path) if config_path.exists() else {}
        template_path = folder / TEMPLATE_FILE
        template = read_text(template_path) if template_path.exists() else None
        return cls(read_text(path), config, load_templates(template, config, str(config_path)), str(path))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, each whole or not at all."""
        folder = Path(folder)
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        if len(self.templates) > 1:
            config["chat_template"] = [{"name": name, "template": text} for name, text in self.templates.items()]
        elif self.templates:
            write_atomic(folder / TEMPLATE_FILE, next(iter(self.templates.values())), TextError)
        write_atomic(folder / TOKENIZER_FILE, self.definition, TextError)
        write_atomic(folder / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2) + "\n", TextError)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows, never fewer."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that no plain text has: special tokens, and the markers of users and tools."""
        return self.special_ids | frozenset(self._control.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what decides the ids of a text: the vocabulary file and the special ids."""
        ids = json.dumps([self.bos_id, self.eos_id, self.pad_id])
        return hashlib.sha256(f"{self.definition}\n{ids}".encode()).hexdigest()

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
        reader = self._markup if parse_control else self._plain
        return self._bos(add_bos) + self._run(reader, [text])[0]

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

    def _run(self, reader: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        try:
            encoded = reader.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TextError(f"text that cannot be encoded as UTF-8: {error}") from None
        return [one.ids for one in encoded]

    @cached_property
    def _markup(self) -> tokenizers.Tokenizer:
        """The backend that turns spellings of control tokens into their ids."""
        return backend(self._json, self.origin)

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _token_names(self) -> dict[str, str]:
        names = [name for name in self.config if name.endswith("_token") and not name.startswith("add_")]
        return {name: text for name in names if (text := spelling(self.config[name])) is not None}

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {row["id"]: str(row["content"]).encode() for row in self._json["added_tokens"]}
        table = [b""] * self.vocab_size
        for token, index in self._plain.get_vocab(with_added_tokens=True).items():
            table[index] = added[index] if index in added else bytes_of(token)
        return table

    def _named_id(self, name: str) -> int | None:
        token = spelling(self.config.get(name))
        if token is None:
            return None
        if not isinstance(token, str):
            raise TextError(f"{name} is {token!r} in {CONFIG_FILE} of {self.origin}; it must be a token's spelling")
        found = self._plain.token_to_id(token)
        if found is None:
            raise TextError(
                f"{name} {token!r} is not in the vocabulary of {self.origin}",
                hint=did_you_mean(token, self._control),
            )
        return found
