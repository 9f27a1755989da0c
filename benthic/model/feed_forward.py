"""Feed-forward layers: a gated one, and one of routed and shared experts."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benthic import ops
from benthic.config.model import ModelConfig
from benthic.model.primitive import Linear
from benthic.ops.expert_decode import MOST_PAIRS
from benthic.ops.route import Routing


class FeedForward(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        placed = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = Linear(width, inner, **placed)
        self.up_proj = Linear(width, inner, **placed)
        self.down_proj = Linear(inner, width, **placed)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Scores tokens against experts, in float32 whatever the model's dtype: near-ties decide where a token goes.

    `e_score_correction_bias` [E] stays float32 when the model is cast: released biases sit near 5, where bfloat16
    steps by 0.03 and would reorder the experts.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(config.n_routed_experts, device=device) if config.has_routing_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        logits = ops.router_logits(x, self.weight)  # [T, E]
        return ops.route(logits, self.e_score_correction_bias, self.config)

    def _apply(self, fn, recurse: bool = True) -> Router:
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


class Experts(nn.Module):
    """Routed experts' weights, stacked: `gate_up_proj` [E, 2F, D] (gate rows first) and `down_proj` [E, D, F]."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "tokens width"], routing: Routing) -> Float[Tensor, "tokens width"]:
        choices = routing.experts, routing.weights
        few = x.is_cuda and not torch.is_grad_enabled() and routing.experts.numel() <= MOST_PAIRS
        if few and routing.count is None:
            return ops.few_token_experts(x, *choices, self.gate_up_proj, self.down_proj)
        return ops.routed_experts(x, *choices, self.gate_up_proj, self.down_proj, routing.count)


class ExpertLayer(nn.Module):
    """Routed experts, chosen for each token, beside shared ones that see every token (one MLP, as wide as all)."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = None
        if config.n_shared_experts:
            inner = config.moe_intermediate_size * config.n_shared_experts
            self.shared_experts = FeedForward(config.hidden_size, inner, device, dtype)

    def forward(
        self, x: Float[Tensor, "batch positions width"]
    ) -> tuple[Float[Tensor, "batch positions width"], Routing]:
        """The sum of both, and how the B S tokens were routed."""
        tokens = x.flatten(0, -2)  # [T, D]
        routing = self.gate(tokens)
        return self._outputs(tokens, routing).view_as(x), routing

    def _outputs(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Of routed and shared experts together, [T, D]."""
        out = self.experts(tokens, routing)
        return out if self.shared_experts is None else out + self.shared_experts(tokens)
