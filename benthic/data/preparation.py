"""prepare: from a DataConfig to a Dataset. Work that an earlier run did for the same text and tokenizer is kept."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path

from benthic.config.data import DataConfig
from benthic.data.dataset import DOCUMENTS_FILE, MANIFEST_FILE, TOKENIZER_FOLDER, VERSION, Dataset, Manifest
from benthic.data.fim import pieces
from benthic.data.passages import passages
from benthic.data.sources import Document, Source, open_source
from benthic.data.splits import Split, split
from benthic.data.tokens import SplitFacts, TokenWriter
from benthic.errors import BenthicError, DataError
from benthic.files import atomic_file, write_atomic
from benthic.log import logger
from benthic.text import Tokenizer, train_tokenizer

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, the bytes of text done and, where known, the bytes there are."""

SPLITS: tuple[Split, Split] = ("train", "validation")

_BATCH_BYTES = 4_000_000


def prepare(config: DataConfig, folder: str | Path, progress: Progress | None = None) -> Dataset:
    """The tokens of `config` in `folder`, made there or found there. Raises DataError, TextError, CapacityError."""
    folder = Path(folder)
    source = open_source(config)
    published = Tokenizer.from_folder(config.tokenizer) if config.tokenizer else None
    wanted = _key(config, source, published)
    found = _reusable(folder, wanted)
    if found is not None:
        logger.info("data: reusing the tokens in %s (%s)", folder, found.manifest.source)
        return found
    report = progress or (lambda stage, done, total: None)
    logger.info("data: %s", source.description)
    tokenizer = published or _train(config, source, report)
    tokenizer.save(folder / TOKENIZER_FOLDER)
    _tokenise(config, source, tokenizer, folder, wanted, report)
    return Dataset.open(folder)


def _key(config: DataConfig, source: Source, published: Tokenizer | None) -> str:
    vocabulary = published.fingerprint if published else [config.vocab_size, config.tokenizer_training_bytes]
    rearranged = [config.fim_rate, config.seed] if config.fim_rate else None
    facts = [VERSION, source.fingerprint, config.validation_fraction, vocabulary, rearranged]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _reusable(folder: Path, wanted: str) -> Dataset | None:
    if not (folder / MANIFEST_FILE).exists():
        return None
    try:
        found = Dataset.open(folder, verify=True)
    except BenthicError as error:
        logger.warning("data: preparing again, because %s", error.message)
        return None
    if found.manifest.key != wanted:
        logger.info("data: preparing again, because the text, the split or the tokenizer changed")
        return None
    return found


def _train(config: DataConfig, source: Source, report: Progress) -> Tokenizer:
    began = time.monotonic()
    total = source.total_bytes and min(source.total_bytes, config.tokenizer_training_bytes)

    def texts() -> Iterator[str]:
        read = 0
        for which, document in split(source.read, config.validation_fraction):
            for passage in passages(document.text) if which == "train" else ():
                if read >= config.tokenizer_training_bytes:
                    return
                read += len(passage.encode())
                report("training the tokenizer", read, total)
                yield passage

    _refuse_empty(source, config)
    tokenizer = train_tokenizer(texts(), config.vocab_size)
    logger.info("data: trained a tokenizer of %d tokens in %.1f s", tokenizer.vocab_size, time.monotonic() - began)
    return tokenizer


def _refuse_empty(source: Source, config: DataConfig) -> None:
    if next(split(source.read, config.validation_fraction), None) is None:
        raise DataError(f"{source.description}: no text in it", hint="point data.path to files with text in them")


def _tokenise(
    config: DataConfig, source: Source, tokenizer: Tokenizer, folder: Path, wanted: str, report: Progress
) -> None:
    began = time.monotonic()
    _refuse_empty(source, config)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    with ExitStack() as files:
        writers = {name: _writer(files, folder, name, tokenizer) for name in SPLITS}
        listing = files.enter_context(atomic_file(folder / DOCUMENTS_FILE, DataError))
        digest = hashlib.sha256()
        done = 0
        for batch in _batches(split(source.read, config.validation_fraction)):
            for name, group in groupby(sorted(batch, key=lambda one: one[0]), key=lambda one: one[0]):
                documents = [document for _, document in group]
                rate = config.fim_rate if name == "train" else 0.0
                writers[name].write(pieces(one, rate, config.seed) or one.text for one in documents)
            rows = "".join(_row(name, document) for name, document in batch).encode()
            listing.write(rows)
            digest.update(rows)
            done += sum(len(document.text.encode()) for _, document in batch)
            report("tokenising", done, source.total_bytes)
        facts = {name: writers[name].facts() for name in SPLITS}
        _refuse_empty_split(facts, source)
    manifest = Manifest(
        version=VERSION,
        key=wanted,
        source=source.description,
        python=platform.python_version(),
        tokenizer=tokenizer.fingerprint,
        documents_sha256=digest.hexdigest(),
        **facts,
    )
    write_atomic(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n", DataError)
    train, held = facts["train"], facts["validation"]
    logger.info(
        "data: %d training tokens (%.2f bytes each), %d held out, in %.1f s",
        train.tokens,
        train.text_bytes / train.tokens,
        held.tokens,
        time.monotonic() - began,
    )


def _writer(files: ExitStack, folder: Path, name: Split, tokenizer: Tokenizer) -> TokenWriter:
    opened = [files.enter_context(atomic_file(folder / f"{name}.{ending}", DataError)) for ending in ("bin", "idx")]
    return TokenWriter(opened[0], opened[1], tokenizer)


def _batches(documents: Iterator[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    batch: list[tuple[Split, Document]] = []
    size = 0
    for name, document in documents:
        batch.append((name, document))
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(name: Split, document: Document) -> str:
    content = document.text.encode()
    row = {"name": document.name, "split": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _refuse_empty_split(facts: dict[Split, SplitFacts], source: Source) -> None:
    for name, found in facts.items():
        if not found.text_bytes:
            raise DataError(
                f"{source.description}: no document fell to the {name} split",
                hint="change data.validation_fraction, or give more documents",
            )
