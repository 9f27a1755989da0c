"""A finished bfloat16 model made to train in FP8, as DeepSeek-V3 was (arXiv:2412.19437, section 3.3).

In FP8: the matrices that the published checkpoints store in FP8, which are attention's projections, dense feed-forwards
and experts, shared and routed, of prediction layers too. In the model's dtype or float32, as section 3.3.1 has it:
embedding, output head, routers, norms, and the attention between projections; also `eh_proj` of prediction layers,
which the paper does not name and the release stores in bfloat16.

Modules change their class and nothing else: parameters, their names, the state dict, saving and loading stay, and the
bfloat16 weights are what an optimiser updates. Their FP8 copies are made when they are used, or once an update where
the trainer says for how long no weight changes (`weights_unchanged`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benthic.config.manifest import parameters
from benthic.errors import ConfigError
from benthic.log import logger
from benthic.model.attention import LatentAttention
from benthic.model.feed_forward import ExpertLayer, Experts, FeedForward
from benthic.model.language_model import LanguageModel
from benthic.model.primitive import Linear
from benthic.ops import float8
from benthic.ops.float8 import Float8Rows, Float8Weight
from benthic.ops.route import Routing

WIDTH_UNIT = 16
"""Rows of whole 16 bytes are what the copy engine moves; transposed, both widths of a matrix are rows."""


@dataclass(frozen=True, slots=True)
class Float8Report:
    """Names of the parameters that FP8 products use, and of the matrices left out with the reason."""

    quantised: tuple[str, ...]
    kept: dict[str, str]


class WeightCopies:
    """The FP8 copies of some parameters: made at each use, and inside `weights_unchanged` at the first alone.

    Whether a parameter has changed cannot be asked of torch: edits through `.data` and what other libraries' kernels
    write are not counted. So copies outlive a use only while someone answers for the weights.
    """

    may_keep = True

    def __init__(self) -> None:
        self._keeping = False
        self._copies: Float8Weight | None = None
        self._seen: tuple[tuple[int, int], ...] = ()

    def of(self, *weights: Tensor) -> Float8Weight:
        """`float8.quantise_weight(*weights)`. Raises RuntimeError where kept ones are seen to be out of date."""
        if not self._keeping:
            return float8.quantise_weight(*weights)
        seen = tuple((weight.data_ptr(), weight._version) for weight in weights)
        if self._copies is None:
            self._copies, self._seen = float8.quantise_weight(*weights), seen
        elif seen != self._seen:
            raise RuntimeError("a weight was changed inside `weights_unchanged`, where its FP8 copy is in use")
        return self._copies

    def keep(self, keeping: bool) -> None:
        """Begin to keep copies, or drop them and end."""
        self._keeping, self._copies = keeping and self.may_keep, None


@contextmanager
def weights_unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, nobody changes a weight of `model`: its FP8 copies are made once. A trainer enters with the first
    micro-batch of an update and leaves before the optimiser's step. A model that is not in FP8 does not notice."""
    found = list(_copies(model))
    for one in found:
        one.keep(True)
    try:
        yield
    finally:
        for one in found:
            one.keep(False)


def keep_no_copies(model: nn.Module) -> None:
    """Make FP8 copies anew at each use of a weight that FSDP gathers: it splits weights over ranks so that none need
    hold them all."""
    for module in model.modules():
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            for one in copies_of(module):
                one.may_keep = False


def _copies(model: nn.Module) -> Iterator[WeightCopies]:
    return chain.from_iterable(map(copies_of, model.modules()))


def copies_of(module: nn.Module) -> Iterator[WeightCopies]:
    return (one for one in vars(module).values() if isinstance(one, WeightCopies))


class Float8Linear(Linear):
    """A projection in FP8; `rows` is its input quantised, where others read it too."""

    def prepare(self) -> None:
        """What __init__ would have added."""
        self.copies = WeightCopies()

    def forward(
        self, input: Float[Tensor, "*tokens into"], rows: Float8Rows | None = None
    ) -> Float[Tensor, "*tokens out"]:
        out = float8.linear_fp8(input, (self.weight,), self.copies.of(self.weight), rows)
        return out if self.bias is None else out + self.bias


class Float8OutputLinear(Linear):
    """The projection after attention: its input is kept by attention, so not a second time in FP8."""

    def prepare(self) -> None:
        """What __init__ would have added."""
        self.copies = WeightCopies()

    def forward(self, input: Float[Tensor, "*tokens into"]) -> Float[Tensor, "*tokens out"]:
        out = float8.output_linear_fp8(input, self.weight, self.copies.of(self.weight))
        return out if self.bias is None else out + self.bias


class Float8LatentAttention(LatentAttention):
    """Quantises its input once, for both projections that read it."""

    def _first_projections(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows = float8.quantise_activation(hidden)
        first = self.q_a_proj if self.compresses_queries else self.q_proj
        return first(hidden, rows), self.kv_a_proj_with_mqa(hidden, rows)


class Float8FeedForward(FeedForward):
    """Gate and up as one product; `rows` is x quantised, where others read it too."""

    def prepare(self) -> None:
        """What __init__ would have added."""
        self.copies, self.down_copies = WeightCopies(), WeightCopies()

    def forward(
        self, x: Float[Tensor, "*tokens width"], rows: Float8Rows | None = None
    ) -> Float[Tensor, "*tokens width"]:
        gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        return float8.feed_forward_fp8(x, (gate, up, down), self.copies.of(gate, up), self.down_copies.of(down), rows)


class Float8Experts(Experts):
    """Routed experts in FP8; tokens reach them quantised."""

    def prepare(self) -> None:
        """What __init__ would have added."""
        self.copies, self.down_copies = WeightCopies(), WeightCopies()

    def forward(
        self,
        x: Float[Tensor, "tokens width"],
        routing: Routing,
        residual: Float[Tensor, "tokens width"] | None = None,
        rows: Float8Rows | None = None,
    ) -> Float[Tensor, "tokens width"]:
        weights = self.gate_up_proj, self.down_proj
        gate_up, down = self.copies.of(weights[0]), self.down_copies.of(weights[1])
        choices = routing.experts, routing.weights
        return float8.routed_experts_fp8(x, *choices, weights, gate_up, down, rows, residual, routing.count)


class Float8ExpertLayer(ExpertLayer):
    """Quantises its input once, for routed and shared experts; the router reads it as it is."""

    def forward(
        self, x: Float[Tensor, "batch positions width"]
    ) -> tuple[Float[Tensor, "batch positions width"], Routing]:
        """As ExpertLayer."""
        tokens = x.flatten(0, -2)  # [T, D]
        routing = self.gate(tokens)
        rows = float8.quantise_activation(tokens)
        shared = None if self.shared_experts is None else self.shared_experts(tokens, rows)
        return self.experts(tokens, routing, shared, rows).view_as(x), routing


def use_float8(model: LanguageModel) -> Float8Report:
    """Make `model`, bfloat16 on a Hopper GPU or a processor (slowly, by the references), compute its products in FP8.

    A sublayer (attention, feed-forward, expert layer) with a width that is no multiple of 16 stays as it is; what stays
    and why is logged and returned. Raises ConfigError for another device or dtype, and where nothing could be
    quantised.
    """
    _check(model)
    shapes = {row.name: row.shape for row in parameters(model.config) if row.fp8}
    quantised: list[str] = []
    kept: dict[str, str] = {}
    for index, layer in enumerate(model.model.layers):
        for part in ("self_attn", "mlp"):
            prefix = f"model.layers.{index}.{part}."
            own = [name for name in shapes if name.startswith(prefix)]
            misfit = next((width for name in own for width in shapes[name][-2:] if width % WIDTH_UNIT), None)
            if misfit is not None:
                kept |= dict.fromkeys(own, f"a width of {misfit} is no multiple of {WIDTH_UNIT}")
                continue
            quantised += own
            for name, module in getattr(layer, part).named_modules():
                _convert(name, module)
    if not quantised:
        raise ConfigError(
            "no matrix of this model can be multiplied in FP8: " + next(iter(kept.values()), "it has none"),
            hint="set precision.compute to bfloat16, or make the widths multiples of 16",
        )
    logger.info("float8: %d of %d matrices multiplied in FP8", len(quantised), len(shapes))
    for reason, count in Counter(kept.values()).items():
        logger.info("float8: %d left in bfloat16: %s", count, reason)
    return Float8Report(tuple(quantised), kept)


def _check(model: LanguageModel) -> None:
    weight = model.head_weight
    if weight.dtype != torch.bfloat16:
        raise ConfigError(
            f"float8 training starts from a bfloat16 model; this one is {weight.dtype}",
            hint="LanguageModel(config, dtype=torch.bfloat16)",
        )
    if weight.device.type == "cuda":
        found = torch.cuda.get_device_capability(weight.device)
        if found != (9, 0):
            raise ConfigError(
                f"float8 training needs a Hopper GPU (sm_90); {torch.cuda.get_device_name(weight.device)} is "
                f"sm_{found[0]}{found[1]}",
                hint="set precision.compute to bfloat16",
            )
    elif weight.device.type not in ("cpu", "meta"):
        raise ConfigError(
            f"float8 training needs a Hopper GPU, or a processor for tests; the model is on {weight.device}",
            hint="set precision.compute to bfloat16",
        )


def _convert(name: str, module: nn.Module) -> None:
    kind = Float8OutputLinear if name == "o_proj" else _FLOAT8.get(type(module))
    if kind is None:
        return
    module.__class__ = kind
    if isinstance(module, Float8Linear | Float8OutputLinear | Float8FeedForward | Float8Experts):
        module.prepare()


_FLOAT8: dict[type[nn.Module], type[nn.Module]] = {
    LatentAttention: Float8LatentAttention,
    Linear: Float8Linear,
    FeedForward: Float8FeedForward,
    Experts: Float8Experts,
    ExpertLayer: Float8ExpertLayer,
}
