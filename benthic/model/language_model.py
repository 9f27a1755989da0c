"""LanguageModel: tokens in, logits and states out; every tensor under its published name."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from benthic import ops
from benthic.config.model import ModelConfig
from benthic.errors import RequestError
from benthic.model.attention import Span
from benthic.model.cache import Cache
from benthic.model.input_ids import check_ids, check_range
from benthic.model.layer import DecoderLayer, PredictionLayer
from benthic.model.pages import Pages
from benthic.model.primitive import Embedding, Linear, RMSNorm
from benthic.model.share import states_of_share
from benthic.ops.rotary import RotaryTable
from benthic.ops.route import Routing
from benthic.parallel.sequence import Share


class States(NamedTuple):
    """What a forward pass leaves before the head: `hidden` after the final norm, `predictions` of depth k = 1, 2 ...
    [B, S - k, D] after shared_head.norm, and the `routing` of every expert layer by its index."""

    hidden: Float[Tensor, "batch positions width"]
    predictions: list[Float[Tensor, "batch _positions width"]]
    routing: dict[int, Routing]


class Decoder(nn.Module):
    """Embedding, layers (prediction layers last) and final norm: the published names start with `model.`."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        main, extra = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            (DecoderLayer if layer < main else PredictionLayer)(config, layer, device, dtype)
            for layer in range(main + extra)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class LanguageModel(nn.Module):
    """A decoder-only language model. Parameters are allocated, not initialised: see `initialise` and `load_model`."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, None if device is None else torch.device(device), dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        self._rotations = RotaryTable(config)

    @property
    def head_weight(self) -> Float[Tensor, "vocabulary width"]:
        """The output head; the embedding itself where both are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def logits(self, hidden: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens vocabulary"]:
        """Of states before the head."""
        return F.linear(hidden, self.head_weight)

    def forward(
        self, input_ids: Int64[Tensor, "batch positions"], *, return_mtp: bool = False, cache: Cache | None = None
    ) -> (
        Float[Tensor, "batch positions vocabulary"]
        | tuple[Float[Tensor, "batch positions vocabulary"], list[Float[Tensor, "batch _positions vocabulary"]]]
    ):
        """Logits of `input_ids`; with `return_mtp` also the list of every prediction layer's, where item k - 1 is
        [B, S - k, V] and its row i predicts token i + k + 1.

        Raises RequestError for ids that are no int64 [B, S], outside the vocabulary, or longer than the model allows.
        """
        check_range(input_ids, self.config.vocab_size)
        depth = min(self.config.num_nextn_predict_layers, input_ids.shape[-1] - 1) if return_mtp else 0
        states = self.states(input_ids, cache=cache, num_predictions=depth)
        logits = self.logits(states.hidden)
        if not return_mtp:
            return logits
        predictions = [self.logits(prediction) for prediction in states.predictions]
        missing = self.config.num_nextn_predict_layers - depth
        return logits, predictions + [logits[:, :0]] * missing

    def states(
        self,
        input_ids: Int64[Tensor, "batch positions"],
        *,
        documents: Int64[Tensor, "batch positions"] | None = None,
        cache: Cache | None = None,
        num_predictions: int = 0,
        share: Share | None = None,
    ) -> States:
        """States before the head.

        `documents` numbers the packed document of each position, and attention stays within one; None lets it cross.
        `cache` holds the tokens before, and takes these in. `num_predictions` prediction layers run. `share` says
        which rows are this process's where several train on the same sequences (share.py).
        """
        self._check(input_ids, documents, cache, num_predictions)
        if share is not None:
            rotations = self._rotations.rows(0, share.length, input_ids.device)
            return States(*states_of_share(self.model, input_ids, rotations, share, documents, num_predictions))
        embedded = self.model.embed_tokens(input_ids)  # [B, S, D]
        span = span_of(input_ids, self._rotations, documents, cache)
        layers = list(enumerate(self.model.layers))
        main = self.config.num_hidden_layers
        hidden, routing = through(layers[:main], embedded, span)
        hidden = self.model.norm(hidden)
        if cache is not None:
            cache.length += input_ids.shape[1]
        predictions, chosen = predicted(layers[main : main + num_predictions], embedded, hidden, span)
        routing |= chosen
        return States(hidden, predictions, routing)

    def paged_states(self, tokens: Int64[Tensor, " tokens"], pages: Pages) -> States:
        """States [1, T, D] of new tokens of several sequences, whose rows join those that `pages` tells of."""
        span = self._paged_span(pages)
        hidden, routing = self.model.embed_tokens(tokens)[None], {}
        out: Tensor | None = None
        for index, layer in enumerate(islice(self.model.layers, self.config.num_hidden_layers)):
            assert isinstance(layer, DecoderLayer)
            hidden, out, chosen = layer.follow(hidden, out, span)
            if chosen is not None:
                routing[index] = chosen
        assert out is not None, "there is at least one layer"
        return States(self.model.norm.of_sum(hidden, out)[1], [], routing)

    def paged_prediction(
        self, index: int, tokens: Int64[Tensor, " tokens"], known: Float[Tensor, "tokens width"], pages: Pages
    ) -> Float[Tensor, "tokens width"]:
        """The state of prediction layer `index` (0 the first) at each of `tokens`, from the state before it.

        Row and position are those of the token, not of the state: what a row holds then depends on no later token, so
        that sequences with equal beginnings share it. No row stands at position 0: `pages.first` is at least 1.
        """
        layer = self.model.layers[self.config.num_hidden_layers + index]
        state, _ = layer(self.model.embed_tokens(tokens)[None], known[None], self._paged_span(pages))
        return state[0]

    def _paged_span(self, pages: Pages) -> Span:
        """Rotations of all positions: each token's own is found on the device."""
        rotations = self._rotations.rows(0, self.config.max_position_embeddings, pages.positions.device)
        return Span(rotations, pages=pages)

    def _check(self, input_ids: Tensor, documents: Tensor | None, cache: Cache | None, num_predictions: int) -> None:
        check_ids(input_ids)
        batch, length = input_ids.shape
        end = length + (cache.length if cache is not None else 0)
        if end > self.config.max_position_embeddings:
            raise RequestError(
                f"{end} positions were asked for; the model's max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        if cache is not None:
            cache.check_room(batch, length)
            if documents is not None or num_predictions:
                raise RequestError("a cache serves one document a sequence and no prediction layers")
        if documents is not None and documents.shape != input_ids.shape:
            raise RequestError(
                f"documents has shape {list(documents.shape)}; it must be that of input_ids, {list(input_ids.shape)}"
            )
        available = min(self.config.num_nextn_predict_layers, length - 1)
        if not 0 <= num_predictions <= available:
            raise RequestError(
                f"num_predictions is {num_predictions}; with {self.config.num_nextn_predict_layers} prediction layers "
                f"and {length} tokens it can be 0 to {available}"
            )


def span_of(input_ids: Tensor, rotations: RotaryTable, documents: Tensor | None, cache: Cache | None = None) -> Span:
    """The positions of `input_ids`, behind those in `cache`; attention crosses no border of `documents`."""
    start, length = cache.length if cache is not None else 0, input_ids.shape[1]
    if documents is not None:
        mask = ops.document_mask(documents)
    else:
        mask = ops.causal_mask(start, length, input_ids.device)
    return Span(rotations.rows(start, length, input_ids.device), mask, cache)


def through(
    layers: Iterable[tuple[int, nn.Module]], hidden: Float[Tensor, "batch positions width"], span: Span
) -> tuple[Float[Tensor, "batch positions width"], dict[int, Routing]]:
    """The residual stream after numbered layers of the main model, and the routing of those with experts."""
    routing: dict[int, Routing] = {}
    for index, layer in layers:
        hidden, chosen = layer(hidden, span)
        if chosen is not None:
            routing[index] = chosen
    return hidden, routing


def predicted(
    layers: Iterable[tuple[int, nn.Module]],
    embedded: Float[Tensor, "batch positions width"],
    hidden: Float[Tensor, "batch positions width"],
    span: Span,
) -> tuple[list[Float[Tensor, "batch _positions width"]], dict[int, Routing]]:
    """States of numbered prediction layers of depth 1, 2 ..., from the embedded tokens and the main model's states
    after its final norm; and their routing."""
    predictions: list[Tensor] = []
    routing: dict[int, Routing] = {}
    for depth, (index, layer) in enumerate(layers, start=1):
        before = predictions[-1] if predictions else hidden
        shorter = _shortened(span, depth)
        known = before[:, : len(shorter.rotations)]
        state, chosen = layer(embedded[:, depth:], known, shorter)
        predictions.append(state)
        if chosen is not None:
            routing[index] = chosen
    return predictions, routing


def _shortened(span: Span, depth: int) -> Span:
    """The span of the positions that still have a token `depth` further on."""
    mask = None if span.mask is None else span.mask[:, :-depth, :-depth]
    return Span(span.rotations[:-depth], mask)
