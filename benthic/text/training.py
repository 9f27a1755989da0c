"""Train a byte-level BPE vocabulary, split and marked as DeepSeek-V3's.

The same texts in the same order give the same tokenizer.json, whatever the number of cores.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from benthic.errors import TextError
from benthic.text.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)
"""Ids 0 to 7 in this order; spelling and the order of the first three as published (bars U+FF5C, blocks U+2581)."""

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# DeepSeek-V3's tokenizer.json: digits in threes, runs of Han and kana, then words, punctuation and white space.
_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def default_chat_template() -> str:
    """The template given to tokenizers trained here: DeepSeek-V3's behaviour, system messages joined after BOS."""
    return resources.files("benthic.text").joinpath("default_chat_template.jinja").read_text(encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens (fewer when the texts hold fewer merges), special tokens included."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise TextError(
            f"vocab_size {vocab_size} is too small: {len(SPECIAL_TOKENS)} special tokens and 256 bytes "
            f"need at least {SMALLEST_VOCABULARY}"
        )
    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_seen(texts), trainer)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return Tokenizer(backend.to_str(pretty=True), _config(), {"default": default_chat_template()}, "trained tokenizer")


def _seen(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise TextError("no text to train a tokenizer on", hint="give at least one document that is not empty")


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
