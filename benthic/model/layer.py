"""Decoder layers and the prediction (MTP) layers behind them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benthic.config.model import ModelConfig
from benthic.model.attention import LatentAttention, PlainAttention, Span
from benthic.model.feed_forward import ExpertLayer, FeedForward
from benthic.model.primitive import Linear, RMSNorm
from benthic.ops.route import Routing


class Layer(nn.Module):
    """Attention and feed-forward, each added to the residual stream; norms before the sublayer or after it (OLMo 2)."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, device, dtype)
        attention = LatentAttention if config.attention_kind == "mla" else PlainAttention
        self.norm_first = config.norm_placement == "before"
        if self.norm_first:
            self.input_layernorm = RMSNorm(*norm)
        self.self_attn = attention(config, layer, device, dtype)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.has_experts = config.is_expert_layer(layer)
        if self.has_experts:
            self.mlp = ExpertLayer(config, device, dtype)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size, device, dtype)
        if not self.norm_first:
            self.post_feedforward_layernorm = RMSNorm(*norm)

    def transform(
        self, hidden: Float[Tensor, "batch positions width"], span: Span
    ) -> tuple[Float[Tensor, "batch positions width"], Routing | None]:
        """The residual stream after the layer, and the routing of a layer with experts."""
        hidden, out, routing = self.follow(hidden, None, span)
        return hidden + out, routing

    def follow(
        self,
        hidden: Float[Tensor, "batch positions width"],
        out: Float[Tensor, "batch positions width"] | None,
        span: Span,
    ) -> tuple[Float[Tensor, "batch positions width"], Float[Tensor, "batch positions width"], Routing | None]:
        """`transform` of hidden + out, its result in two summands too: the next norm adds them in passing."""
        if self.norm_first:
            if out is None:
                normed = self.input_layernorm(hidden)
            else:
                hidden, normed = self.input_layernorm.of_sum(hidden, out)
            hidden, normed = self.post_attention_layernorm.of_sum(hidden, self.self_attn(normed, span))
            return hidden, *self._feed_forward(normed)
        hidden = hidden if out is None else hidden + out
        hidden = hidden + self.post_attention_layernorm(self.self_attn(hidden, span))
        out, routing = self._feed_forward(hidden)
        return hidden, self.post_feedforward_layernorm(out), routing

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        return self.mlp(x) if self.has_experts else (self.mlp(x), None)


class DecoderLayer(Layer):
    """One layer of the main model."""

    def forward(
        self, hidden: Float[Tensor, "batch positions width"], span: Span
    ) -> tuple[Float[Tensor, "batch positions width"], Routing | None]:
        """As `transform`."""
        return self.transform(hidden, span)


class SharedHead(nn.Module):
    """The norm before the head of a prediction layer; the head itself is the main model's."""

    def __init__(self, config: ModelConfig, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device, dtype)


class PredictionLayer(Layer):
    """Multi-token prediction (DeepSeek-V3, section 2.2): from the state at i and token i + k, the state that predicts
    token i + k + 1. The released weights take the embedding first, unlike the paper's equation 21."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__(config, layer, device, dtype)
        norm = (config.hidden_size, config.rms_norm_eps, device, dtype)
        self.enorm = RMSNorm(*norm)
        self.hnorm = RMSNorm(*norm)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False, device=device, dtype=dtype)
        self.shared_head = SharedHead(config, device, dtype)

    def forward(
        self,
        embedded: Float[Tensor, "batch positions width"],
        hidden: Float[Tensor, "batch positions width"],
        span: Span,
    ) -> tuple[Float[Tensor, "batch positions width"], Routing | None]:
        """Embeddings of tokens i + k and states at i, for S - k positions, to states after shared_head.norm."""
        joined = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        hidden, routing = self.transform(joined, span)
        return self.shared_head.norm(hidden), routing
