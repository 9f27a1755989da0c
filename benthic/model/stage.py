"""A stage of a pipeline: some consecutive layers of a model, the same modules under the same names.

The first stage holds the embedding; the last one final norm, head and every prediction layer. A prediction layer reads
the embedding of the tokens it is told and shares the main model's head. Both are held once: the head is there, and the
rows of the embedding travel with the states from the first stage to the last. So no stage sees another's weights, and
gradients of the embedding add up on the way back, as they do in one process, under every schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from benthic.config.model import ModelConfig
from benthic.model.language_model import LanguageModel, States, predicted, span_of, through
from benthic.ops.rotary import RotaryTable


class _Decoder(nn.Module):
    """Those modules of a model's Decoder that a stage has."""

    def __init__(self, whole: nn.Module, layers: range, begins: bool, ends: bool) -> None:
        super().__init__()
        if begins:
            self.embed_tokens = whole.get_submodule("embed_tokens")
        self.layers = nn.ModuleDict({str(layer): whole.get_submodule(f"layers.{layer}") for layer in layers})
        if ends:
            self.norm = whole.get_submodule("norm")


class Stage(nn.Module):
    """`layers` of `whole`, whose modules it shares."""

    def __init__(self, whole: LanguageModel, layers: range) -> None:
        super().__init__()
        config = self.config = whole.config
        self.layers = layers
        self.begins = layers.start == 0
        self.ends = layers.stop == config.num_hidden_layers + config.num_nextn_predict_layers
        self.model = _Decoder(whole.model, layers, self.begins, self.ends)
        if self.ends:
            self.lm_head = whole.lm_head
        self._rotations = RotaryTable(config)

    @property
    def head_weight(self) -> Float[Tensor, "vocabulary width"] | None:
        """The output head, on the last stage."""
        return self.lm_head.weight if self.ends else None

    def forward(
        self,
        input_ids: Int64[Tensor, "batch positions"],
        passed: Float[Tensor, "batch positions passed"] | None,
        documents: Int64[Tensor, "batch positions"] | None,
        num_predictions: int,
    ) -> States:
        """States before the head on the last stage; elsewhere `hidden` is what the next stage is to be passed."""
        embedded = None
        if passed is None:
            hidden = embedded = self.model.embed_tokens(input_ids)
        elif self.config.num_nextn_predict_layers:
            hidden, embedded = passed.chunk(2, -1)
        else:
            hidden = passed
        span = span_of(input_ids, self._rotations, documents)
        main = self.config.num_hidden_layers
        hidden, routing = through(self._numbered(range(self.layers.start, min(self.layers.stop, main))), hidden, span)
        if not self.ends:
            travels = embedded is not None and self.config.num_nextn_predict_layers > 0
            return States(torch.cat((hidden, embedded), -1) if travels else hidden, [], routing)
        hidden, predictions = self.model.norm(hidden), []
        if embedded is not None:
            layers = self._numbered(range(main, main + num_predictions))
            predictions, chosen = predicted(layers, embedded, hidden, span)
            routing |= chosen
        return States(hidden, predictions, routing)

    def _numbered(self, layers: range) -> Iterable[tuple[int, nn.Module]]:
        return ((layer, self.model.layers[str(layer)]) for layer in layers)


def width_passed(config: ModelConfig) -> int:
    """Numbers a token that go from stage to stage: its state, and its embedding where prediction layers wait for it."""
    return config.hidden_size * (2 if config.num_nextn_predict_layers else 1)


def cut_to_stages(whole: LanguageModel, stages: Sequence[range]) -> list[Stage]:
    """Drop all of `whole` that belongs to none of `stages` (the layers of each), in place, and return those."""
    cut = [Stage(whole, layers) for layers in stages]
    kept = sorted(layer for layers in stages for layer in layers)  # module order is that of the manifest
    decoder = whole.model
    decoder.add_module("layers", nn.ModuleDict({str(layer): decoder.layers[layer] for layer in kept}))
    if not any(stage.begins for stage in cut):
        del decoder.embed_tokens
    if not any(stage.ends for stage in cut):
        del decoder.norm, whole.lm_head
    return cut
