"""DataConfig: which text a run learns from, how it becomes tokens, and how tokens become sequences."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from benthic.config.settings import Settings

SourceKind = Literal["stdlib", "folder", "jsonl", "parquet", "procedural"]

Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Settings):
    """Everything that decides the tokens a run sees, and their order."""

    source: SourceKind = "stdlib"
    """stdlib: this Python's standard library, read in place. procedural: text benthic writes, always the same."""
    path: str | None = None
    """The folder or file of a folder, jsonl or parquet source."""
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".py")
    """Files a folder source reads."""
    text_field: str = "text"
    """Where a jsonl line or a parquet table keeps its text."""
    procedural_bytes: int = Field(2_000_000, ge=1)
    """Size of procedural text, in bytes of UTF-8."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the documents held out, chosen by the hash of their names; of few documents, the end of each."""

    tokenizer: str | None = None
    """Folder of a published tokenizer; None trains one on the training text."""
    vocab_size: int = Field(4096, ge=264)
    """Size of a trained tokenizer, special tokens included (264: eight of them and 256 bytes)."""
    tokenizer_training_bytes: int = Field(50_000_000, ge=1)
    """A trained tokenizer reads no more than this much of the training text, from its start."""

    sequence_length: int = Field(256, ge=1)
    """Positions a sequence; one more token is read for its last label."""
    mask_documents: bool = False
    """Keep attention and labels inside a document. DeepSeek-V3 packs without it (arXiv:2412.19437, section 4.1)."""
    fim_rate: Share = 0.0
    """Share of training documents rearranged to fill in the middle (V3: 0.1)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of procedural text, of rearranged documents and of the order of sequences."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        reads_path = self.source in ("folder", "jsonl", "parquet")
        if reads_path and not self.path:
            raise ValueError(f"source {self.source!r} needs a path")
        if self.path and not reads_path:
            raise ValueError(f"source {self.source!r} takes no path (given {self.path!r})")
        return self
