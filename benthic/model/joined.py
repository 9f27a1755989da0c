"""Projections of one input as one product, for inference: gate and up, and what attention takes of its input first.

At batch 1 a product takes little longer than its launch. The weights of both lie behind one another in memory, where
joining them has laid them, and stay parameters of their own under their published names. Of few tokens the shared
experts are read along with the routed ones: four launches fewer a layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benthic import ops
from benthic.model.attention import LatentAttention
from benthic.model.feed_forward import ExpertLayer, Experts, FeedForward
from benthic.model.float8_storage import FLOAT8, SCALE_SUFFIX
from benthic.model.primitive import Linear
from benthic.numerics.reference.quantisation import BLOCK
from benthic.ops.expert_decode import MOST_PAIRS
from benthic.ops.route import Routing

MOST_TOKENS = 32
"""The most that a program of the joint call works for at once: of more it would read the shared weights again."""


class DecodingLinear(Linear):
    """A projection that stands alone, for a token or many."""

    def forward(self, input: Float[Tensor, "*tokens into"]) -> Float[Tensor, "*tokens out"]:
        return super().forward(input) if torch.is_grad_enabled() else ops.few_token_linear(input, self.weight)


class JoinedFeedForward(FeedForward):
    """Gate and up as one product."""

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        both = _product(x, self.gate_proj, self.up_proj)
        return super().forward(x) if both is None else self.down_proj(ops.swiglu(*both))


class JoinedLatentAttention(LatentAttention):
    """Queries, or what they are compressed to, and latents as one product."""

    def _first_projections(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        first = self.q_a_proj if self.compresses_queries else self.q_proj
        both = _product(hidden, first, self.kv_a_proj_with_mqa)
        return super()._first_projections(hidden) if both is None else both


class JoinedExpertLayer(ExpertLayer):
    """Shared experts as more of the routed ones, where those are launched as one."""

    def _outputs(self, tokens: Tensor, routing: Routing) -> Tensor:
        experts, shared = self.experts, self.shared_experts
        if shared is None or not _reads_together(tokens, routing, experts):
            return super()._outputs(tokens, routing)
        gate_up, down = _as_one(shared.gate_proj.weight, shared.up_proj.weight), shared.down_proj.weight
        if gate_up is None or not gate_up.dtype == down.dtype == experts.gate_up_proj.dtype == tokens.dtype:
            return super()._outputs(tokens, routing)
        choices = routing.experts, routing.weights, experts.gate_up_proj, experts.down_proj
        return ops.few_token_experts(tokens, *choices, gate_up, down)


def _reads_together(tokens: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether all experts take one call: of few tokens, on a GPU."""
    few = len(tokens) <= MOST_TOKENS and routing.experts.numel() <= MOST_PAIRS and routing.count is None
    return few and tokens.is_cuda and type(experts) is Experts and not torch.is_grad_enabled()


def join_projections(model: nn.Module) -> None:
    """Lay weights that read the same input behind one another, in place, and let one product read them: projections
    without biases, and in FP8 those whose blocks do not run into each other."""
    for module in model.modules():
        if type(module) is Linear and module.bias is None:
            module.__class__ = DecodingLinear
        elif type(module) is ExpertLayer:
            module.__class__ = JoinedExpertLayer
        elif type(module) is FeedForward and _lay(module.gate_proj, module.up_proj):
            module.__class__ = JoinedFeedForward
        elif type(module) is LatentAttention:
            first = module.q_a_proj if module.compresses_queries else module.q_proj
            if _lay(first, module.kv_a_proj_with_mqa):
                module.__class__ = JoinedLatentAttention


def _lay(first: nn.Linear, second: nn.Linear) -> bool:
    """Whether two layers' weights, and the factors of those in FP8, lie behind one another now."""
    one, other = first.weight, second.weight
    if first.bias is not None or second.bias is not None or one.dtype != other.dtype:
        return False
    if one.dtype == FLOAT8:
        if len(one) % BLOCK[0]:
            return False
        _lay_tensors([getattr(layer, "weight" + SCALE_SUFFIX) for layer in (first, second)])
    _lay_tensors([one, other])
    return True


def _lay_tensors(tensors: list[Tensor]) -> None:
    """Move tensors into one piece of memory."""
    whole = tensors[0].new_empty(sum(map(len, tensors)), *tensors[0].shape[1:])
    bounds = pairwise((0, len(tensors[0]), len(whole)))
    for tensor, (begin, end) in zip(tensors, bounds, strict=True):
        whole[begin:end].copy_(tensor.detach())
        tensor.data = whole[begin:end]


def _product(x: Tensor, first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Both layers' outputs; None where gradients are wanted, or somebody gave a layer other weights since."""
    weight = None if torch.is_grad_enabled() else _as_one(first.weight, second.weight)
    if weight is None:
        return None
    if weight.dtype == FLOAT8:
        scales = _as_one(*(getattr(layer, "weight" + SCALE_SUFFIX) for layer in (first, second)))
        if scales is None:
            return None
        out = ops.linear_from_float8(x, weight, scales)
    else:
        out = ops.few_token_linear(x, weight)
    one, other = out.split_with_sizes((first.out_features, second.out_features), -1)
    return one, other


def _as_one(first: Tensor, second: Tensor) -> Tensor | None:
    """Two matrices as the one that they are parts of, if they are."""
    if first.data_ptr() + first.nbytes != second.data_ptr() or first.dtype != second.dtype:
        return None
    if first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return None
    return first.as_strided((len(first) + len(second), first.shape[1]), (first.shape[1], 1))
