"""The finished model: weights in the published layout, tokenizer, chat template, and a card that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benthic.checkpoint import write_checkpoint
from benthic.config.manifest import parameters
from benthic.config.model import ModelConfig
from benthic.config.train import TrainConfig
from benthic.files import write_atomic
from benthic.text.tokenizer import Tokenizer
from benthic.train.disk import publish_folder

PSF_NOTICE = """\
The training text is the source code of the Python standard library, Copyright (c) 2001 Python Software Foundation;
All Rights Reserved, used under the Python Software Foundation License Version 2
(https://docs.python.org/3/license.html). It was read from the trainer's own installation and is not part of this
folder; the model can reproduce fragments of it, and those stay under that licence."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card states about a run."""

    corpus: str
    corpus_fingerprint: str
    steps: int
    tokens: int
    validation: Mapping[str, object]


def export(
    weights: Mapping[str, Tensor], config: TrainConfig, tokenizer: Tokenizer, folder: Path, facts: Facts
) -> None:
    """Write the model folder, in place of one from an earlier stretch of the run; all of it or nothing."""
    model = config.model.replace(
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
    )

    def fill(partial: Path) -> None:
        tokenizer.save(partial)
        write_checkpoint(weights, model, partial, config.checkpoint.export_weights)
        write_atomic(partial / "README.md", card(config, facts))

    publish_folder(folder, "the finished model", fill)


def card(config: TrainConfig, facts: Facts) -> str:
    """The text of the model card."""
    rows = {
        "parameters": f"{parameter_count(config.model):,}",
        "updates": f"{facts.steps:,}",
        "training tokens": f"{facts.tokens:,}",
        **{name: _shown(value) for name, value in facts.validation.items()},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    notice = f"\n{PSF_NOTICE}\n" if config.data.source == "stdlib" else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- benthic
---

# {config.name}

A {_kind(config.model)} language model trained with benthic from {_origin(config)}.

## Data

Trained on {facts.corpus}. The documents were split by the hash of their names, and
{config.data.validation_fraction:.0%} of them held out. Fingerprint of the corpus: `{facts.corpus_fingerprint}`.
{notice}
## Numbers

Measured on the held-out documents at the end of the run.

| | |
|---|---|
{table}

Bits per byte count every predicted token, end-of-text tokens included, over the bytes of the text they cover.

## Limits

{_limits(config)}
"""


def parameter_count(config: ModelConfig) -> int:
    """Trained parameters, prediction layers included, routing biases not."""
    return sum(row.size for row in parameters(config) if row.group != "routing_bias")


def _kind(config: ModelConfig) -> str:
    experts = f"{config.n_routed_experts} experts a layer" if config.n_routed_experts else "dense"
    return f"{config.attention_kind.upper()}, {experts},"


def _origin(config: TrainConfig) -> str:
    return "random weights" if config.start_from is None else f"the weights of {Path(config.start_from).name}"


def _limits(config: TrainConfig) -> str:
    if config.start_from is not None:
        return "This run continued the pretraining of another model, whose own card says what it was taught before."
    return """\
A model that learnt from this text alone continues text in its manner and knows nothing else. It has had no instruction
tuning, so the chat template marks turns but the model was not taught to answer in them."""


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
