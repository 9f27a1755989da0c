"""The model over the paged cache: a step's work in, states and logits out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benthic import ops
from benthic.config.engine import EngineConfig
from benthic.inference.batch import Stretch, bounds_of, lay_out
from benthic.inference.graphs import Graphs, suits
from benthic.inference.scheduler import Work
from benthic.model import LanguageModel, States
from benthic.model.pages import Pages, make_pools, row_format
from benthic.ops.route import Routing


class Likeliest(NamedTuple):
    """The likeliest token of each row, int64 [R], and what is told of it: see `told_of`."""

    tokens: Tensor
    told: Tensor

    def first(self, rows: int) -> Likeliest:
        """Of the first rows alone."""
        return Likeliest(self.tokens[:rows], self.told[:, :rows])


def likeliest_of(logits: Tensor) -> Likeliest:
    """Of logits [R, V]."""
    return Likeliest(*ops.likeliest(logits))


def told_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [R], their log-probabilities, and ones: float64 [3, R], which holds each exactly. One NaN or infinity
    among the logits makes their sum one, and so the log-probability."""
    logprobs = log_probabilities(logits, tokens)
    return torch.stack((tokens.double(), logprobs.double(), torch.ones_like(logprobs, dtype=torch.float64)))


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of one token a row: float32 [R]."""
    return logits.log_softmax(-1, dtype=torch.float32).gather(-1, tokens[:, None])[:, 0]


class Computed(NamedTuple):
    """States [T, D] of a step's tokens after the final norm, the rows of each piece of work, the routing, and logits
    [T, V] with their likeliest tokens where they came along. What a graph left is there until its next replay."""

    hidden: Tensor
    rows: list[slice]
    routing: dict[int, Routing]
    logits: Tensor | None = None
    likeliest: Likeliest | None = None


class Runner:
    """A model and the pools that hold its rows; prediction layers have pools only where they are used."""

    def __init__(self, model: LanguageModel, settings: EngineConfig, num_blocks: int, use_predictions: bool) -> None:
        self.model, self.block_size = model, settings.block_size
        self.device, self.dtype = model.head_weight.device, model.head_weight.dtype
        self.num_predictions = model.config.num_nextn_predict_layers if use_predictions else 0
        layers = model.config.num_hidden_layers + self.num_predictions
        row = row_format(model.config, self.dtype, self.device, settings.cache)
        self.pools = make_pools(row, num_blocks, settings.block_size, self.device, layers)
        self._graphs = self._capturable() if self.device.type == "cuda" and settings.cuda_graphs else []

    @property
    def captures(self) -> bool:
        """Whether decoding is replayed from graphs, launched without waiting."""
        return bool(self._graphs)

    def compute(self, works: Sequence[Work]) -> Computed:
        """Run the main model over the tokens and drafts of `works`."""
        stretches = []
        for request, count, drafts in works:
            tokens = request.tokens[request.computed : request.computed + count]
            stretches.append(Stretch([*tokens, *drafts], request.computed, request.blocks))
        bounds = bounds_of(stretches)
        rows = [slice(begin, end) for begin, end in pairwise(bounds)]
        if self._graphs and suits(stretches):
            return self._captured(stretches, rows)
        tokens, pages = lay_out(stretches, self.pools, self.block_size, self.device)
        states = self.model.paged_states(tokens, pages)
        return Computed(states.hidden[0], rows, states.routing)

    def compute_ahead(self, works: Sequence[Work], tokens: Tensor, places: Sequence[int]) -> Computed | None:
        """`compute` for one more token of each request, which stands in row `places[i]` of `tokens` on the device and
        is not known to the host; None where no graph serves that."""
        stretches = [Stretch((0,), len(work.request.tokens), work.request.blocks) for work in works]
        if not self._graphs or not suits(stretches):
            return None
        return self._captured(stretches, [slice(row, row + 1) for row in range(len(works))], (tokens, places))

    def _captured(
        self, stretches: Sequence[Stretch], rows: list[slice], source: tuple[Tensor, Sequence[int]] | None = None
    ) -> Computed:
        states, logits, likeliest = self._graphs[0].run(stretches, source=source)
        end = rows[-1].stop
        return Computed(states.hidden[0, :end], rows, states.routing, logits[:end], likeliest.first(end))

    def predict(self, layer: int, stretches: Sequence[Stretch], known: Tensor) -> Tensor:
        """States [T, D] of prediction layer `layer` (0 the first) at the tokens of `stretches`, from the `known` states
        [T, D] before them."""
        if self._graphs and suits(stretches):
            # A copy: what a request carries must outlive the next replay.
            return self._graphs[layer + 1].run(stretches, known)[: len(known)].clone()
        tokens, pages = lay_out(stretches, self.pools, self.block_size, self.device, first=layer + 1)
        return self.model.paged_prediction(layer, tokens, known, pages)

    def _capturable(self) -> list[Graphs]:
        """The main model with its head, then each prediction layer; one pool of memory holds what all of them need."""
        memory = torch.cuda.graph_pool_handle()

        def main(tokens: Tensor, known: Tensor | None, pages: Pages) -> tuple[States, Tensor, Likeliest]:
            states = self.model.paged_states(tokens, pages)
            logits = self.logits(states.hidden[0])
            return states, logits, likeliest_of(logits)

        calls = [main, *(partial(self._predict_whole, layer) for layer in range(self.num_predictions))]
        return [Graphs(call, self.pools, self.block_size, memory, first) for first, call in enumerate(calls)]

    def _predict_whole(self, layer: int, tokens: Tensor, known: Tensor, pages: Pages) -> Tensor:
        return self.model.paged_prediction(layer, tokens, known, pages)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] of states [R, D]."""
        return F.linear(hidden, self.model.head_weight)

    def take_rows(self, hidden: Tensor, rows: Sequence[int]) -> Tensor:
        """Those rows of `hidden`; itself where they are all of them."""
        if len(rows) == len(hidden):
            return hidden
        return hidden.index_select(0, torch.tensor(rows, device=hidden.device))
