"""Sources: where text comes from, document by document, in an order that does not change.

A source knows its fingerprint without reading its text (names, sizes and times of its files), so that tokens prepared
once are found again. Whatever is wrong with a file is a DataError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benthic.config.data import DataConfig
from benthic.data import procedural
from benthic.errors import DataError, did_you_mean

STDLIB_LEFT_OUT = frozenset("test tests site-packages dist-packages idlelib encodings pydoc_data __pycache__".split())
"""Tests, what others installed, a graphical editor, and what a program wrote: `encodings`, a megabyte of tables, and
`pydoc_data`, whose one file of 0.75 MB would be half of any held-out part that it fell into."""

STDLIB_LEAST_BYTES = 2_000_000
"""Less than this is a stripped library (embedded and frozen Pythons); a whole one has about ten million."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with the name that decides its split."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """A corpus that can be read more than once."""

    description: str
    """What a user reads in logs and model cards."""
    fingerprint: str
    total_bytes: int | None
    """Size of what will be read, for progress; None when only reading tells."""
    read: Callable[[], Iterator[Document]]


def open_source(config: DataConfig) -> Source:
    """The source `config` names. Raises DataError when it is missing, empty or not readable."""
    match config.source:
        case "stdlib":
            return standard_library()
        case "procedural":
            return _procedural(config)
        case "folder":
            return _folder(config)
        case "jsonl":
            return _tables(config, ".jsonl", _read_jsonl)
        case "parquet":
            return _tables(config, ".parquet", _read_parquet)


def standard_library(root: Path | None = None) -> Source:
    """The source text of this Python's standard library, read in place; licence PSF-2.0, nothing is copied."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files = _files(root, (".py",), STDLIB_LEFT_OUT) if root.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    if size < STDLIB_LEAST_BYTES:
        raise DataError(
            f"the standard library in {root} holds {size} bytes of source; a whole one has at least "
            f"{STDLIB_LEAST_BYTES} (it is zipped or stripped)",
            hint="use text benthic writes itself (source procedural) or a folder of your own",
        )

    def read() -> Iterator[Document]:
        for path in files:
            try:
                yield Document(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a few modules declare another encoding; they are not the user's to mend
                continue

    description = f"the standard library of Python {platform.python_version()} ({len(files)} files, PSF-2.0)"
    return Source(description, _fingerprint("stdlib", platform.python_version(), _rows(root, files)), size, read)


def _procedural(config: DataConfig) -> Source:
    size, seed = config.procedural_bytes, config.seed

    def read() -> Iterator[Document]:
        return (Document(name, text) for name, text in procedural.documents(size, seed))

    return Source(f"procedural text, {size} bytes, seed {seed}", _fingerprint("procedural", 1, size, seed), size, read)


def _folder(config: DataConfig) -> Source:
    root = _existing(config)
    files = _files(root, config.suffixes)
    if not files:
        raise DataError(
            f"no file ending in {', '.join(config.suffixes)} in {root}",
            hint="set data.suffixes to the endings you have",
        )

    def read() -> Iterator[Document]:
        for path in files:
            yield Document(path.relative_to(root).as_posix() if root.is_dir() else path.name, _text(path))

    return _source_of_files("folder", root, files, config, read)


def _tables(config: DataConfig, suffix: str, reader: Callable[[Path, str], Iterator[str]]) -> Source:
    root = _existing(config)
    files = _files(root, (suffix,)) if root.is_dir() else [root]
    if not files:
        raise DataError(f"no {suffix} file in {root}")

    def read() -> Iterator[Document]:
        for path in files:
            for row, text in enumerate(reader(path, config.text_field), start=1):
                yield Document(f"{path.name}:{row}", text)

    return _source_of_files(config.source, root, files, config, read)


def _source_of_files(
    kind: str, root: Path, files: list[Path], config: DataConfig, read: Callable[[], Iterator[Document]]
) -> Source:
    size = sum(path.stat().st_size for path in files)
    if not size:
        raise DataError(f"{root} holds no text: {len(files)} files of 0 bytes")
    base = root if root.is_dir() else root.parent
    fingerprint = _fingerprint(kind, config.text_field, _rows(base, files))
    return Source(f"{len(files)} files of {root}", fingerprint, None if kind == "parquet" else size, read)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, content in enumerate(_lines(path), start=1):
        line = _decoded(content, f"{path}, line {number}")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} holds a {type(row).__name__}, not an object")
        if field not in row:
            raise DataError(f"{path}, line {number} has no field {field!r}", hint=did_you_mean(field, row))
        if not isinstance(row[field], str):
            raise DataError(f"{path}, line {number}: field {field!r} holds a {type(row[field]).__name__}, not text")
        if any("\ud800" <= character <= "\udfff" for character in row[field]):
            raise DataError(
                f"{path}, line {number}: field {field!r} holds half a surrogate pair, which is no character"
            )
        yield row[field]


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            "reading parquet needs pyarrow, which is not installed", hint="pip install 'benthic[data]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        if field not in table.schema_arrow.names:
            raise DataError(f"{path} has no column {field!r}", hint=did_you_mean(field, table.schema_arrow.names))
        kind = table.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f"{path}: column {field!r} holds {kind}, not text")
        for batch in table.iter_batches(columns=[field], batch_size=1024):
            yield from (value for value in batch.column(0).to_pylist() if value is not None)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as parquet: {error}") from None


def _existing(config: DataConfig) -> Path:
    root = Path(str(config.path)).expanduser()
    if not root.exists():
        raise DataError(f"data path {root} does not exist")
    return root


def _files(root: Path, suffixes: tuple[str, ...], left_out: frozenset[str] = frozenset()) -> list[Path]:
    """Files below `root` with one of `suffixes`, sorted by name, without hidden ones; `root` itself if it is a file."""
    if root.is_file():
        return [root]
    found: list[Path] = []
    for folder, inner, names in os.walk(root, onerror=_refuse):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in left_out]
        found += [Path(folder, name) for name in names if Path(name).suffix in suffixes and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read {error.filename}: {error.strerror}") from None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        _refuse(error)


def _text(path: Path) -> str:
    try:
        return _decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _decoded(content: bytes, where: str) -> str:
    if b"\0" in content:
        raise DataError(f"{where} is binary (a zero byte at {content.index(0)})", hint="leave it out of the data path")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text (byte 0x{content[error.start]:02x} at {error.start})",
            hint="convert it, for example with iconv, or leave it out",
        ) from None


def _rows(root: Path, files: list[Path]) -> list[tuple[str, int, int]]:
    stats = ((path, path.stat()) for path in files)
    return [(path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _fingerprint(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
