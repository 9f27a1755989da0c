"""The whole network in float32 over a dictionary of tensors under their manifest names: the oracle of every test.

No modules, no cache, no cleverness. Latent attention in both forms; MHA, GQA and MQA; norms before or after the
sublayer; query-key norms; dense and expert layers; prediction layers; packed documents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from benthic.config.model import LATENT_NORM_EPS, ModelConfig
from benthic.numerics.reference.attention import absorbed_attention, attention, visible
from benthic.numerics.reference.experts import feed_forward, routed_experts
from benthic.numerics.reference.norm import rms_norm
from benthic.numerics.reference.rotary import rotary, rotation
from benthic.numerics.reference.routing import route

Tensors = dict[str, Tensor]


class Result(NamedTuple):
    """`logits`, those of every prediction layer k = 1, 2 ... [B, S - k, V], and chosen experts by layer index."""

    logits: Float[Tensor, "batch positions vocabulary"]
    predictions: list[Float[Tensor, "batch _positions vocabulary"]]
    experts: dict[int, Int64[Tensor, "tokens chosen"]]


def forward(
    tensors: Tensors,
    config: ModelConfig,
    input_ids: Int64[Tensor, "batch positions"],
    documents: Int64[Tensor, "batch positions"] | None = None,
    absorbed: bool = False,
) -> Result:
    """The network at `input_ids`; `documents` keeps attention within one; `absorbed` computes latent attention on the
    latents."""
    embedding = tensors["model.embed_tokens.weight"]
    head = embedding if config.tie_word_embeddings else tensors["lm_head.weight"]
    network = _Network(tensors, config, absorbed)
    hidden = embedding[input_ids]
    for layer in range(config.num_hidden_layers):
        hidden = network.layer(layer, hidden, documents)
    hidden = network.norm("model.norm", hidden)
    state, predictions = hidden, []
    for depth in range(1, config.num_nextn_predict_layers + 1):
        layer = config.num_hidden_layers + depth - 1
        state = network.predict(layer, embedding[input_ids[:, depth:]], state[:, :-1], documents)
        predictions.append(state @ head.T)
    return Result(hidden @ head.T, predictions, network.experts)


class _Network:
    def __init__(self, tensors: Tensors, config: ModelConfig, absorbed: bool) -> None:
        self.tensors, self.config, self.absorbed = tensors, config, absorbed
        self.experts: dict[int, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.tensors.get(name + ".bias")
        out = x @ self.tensors[name + ".weight"].T
        return out if bias is None else out + bias

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        return rms_norm(x, self.tensors[name + ".weight"], eps or self.config.rms_norm_eps)

    def layer(self, layer: int, hidden: Tensor, documents: Tensor | None) -> Tensor:
        name = f"model.layers.{layer}."
        attend = self.latent_attention if self.config.kv_lora_rank else self.plain_attention
        mask = visible(hidden.shape[1], None if documents is None else documents[:, : hidden.shape[1]])
        if self.config.norm_placement == "before":
            hidden = hidden + attend(name + "self_attn.", self.norm(name + "input_layernorm", hidden), mask)
            return hidden + self.feed_forward(layer, self.norm(name + "post_attention_layernorm", hidden))
        hidden = hidden + self.norm(name + "post_attention_layernorm", attend(name + "self_attn.", hidden, mask))
        return hidden + self.norm(name + "post_feedforward_layernorm", self.feed_forward(layer, hidden))

    def predict(self, layer: int, embedded: Tensor, state: Tensor, documents: Tensor | None) -> Tensor:
        name = f"model.layers.{layer}."
        joined = torch.cat((self.norm(name + "enorm", embedded), self.norm(name + "hnorm", state)), -1)
        hidden = self.layer(layer, self.linear(name + "eh_proj", joined), documents)
        return self.norm(name + "shared_head.norm", hidden)

    def turn(self, x: Tensor) -> Tensor:
        rope, width = self.config.rope_parameters, self.config.rotary_dim
        return rotary(x, *rotation(rope, width, torch.arange(x.shape[1])), self.config.rope_interleave)

    def latent_attention(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        config, heads = self.config, self.config.num_attention_heads
        latent_width, key_width = config.kv_lora_rank, config.qk_nope_head_dim
        if config.q_lora_rank:
            compressed = self.norm(name + "q_a_layernorm", self.linear(name + "q_a_proj", x), LATENT_NORM_EPS)
            query = self.linear(name + "q_b_proj", compressed)
        else:
            query = self.linear(name + "q_proj", x)
        query = query.unflatten(-1, (heads, -1))
        query, rotary_query = query[..., :key_width], self.turn(query[..., key_width:])
        joint = self.linear(name + "kv_a_proj_with_mqa", x)
        latent = self.norm(name + "kv_a_layernorm", joint[..., :latent_width], LATENT_NORM_EPS)
        rotary_key = self.turn(joint[..., None, latent_width:])  # [B, S, 1, R]
        expansion = self.tensors[name + "kv_b_proj.weight"].view(heads, -1, latent_width)
        if self.absorbed:
            latents = torch.cat((latent, rotary_key[:, :, 0]), -1)
            out = absorbed_attention(query, rotary_query, latents, expansion, config.softmax_scale, mask)
        else:
            expanded = torch.einsum("bsc,hnc->bshn", latent, expansion)
            key = torch.cat((expanded[..., :key_width], rotary_key.expand(-1, -1, heads, -1)), -1)
            query = torch.cat((query, rotary_query), -1)
            out = attention(query, key, expanded[..., key_width:], config.softmax_scale, mask)
        return self.linear(name + "o_proj", out.flatten(2))

    def plain_attention(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        width = self.config.query_head_dim
        query, key, value = (self.linear(name + part, x) for part in ("q_proj", "k_proj", "v_proj"))
        if self.config.qk_norm:
            query, key = self.norm(name + "q_norm", query), self.norm(name + "k_norm", key)
        query, key, value = (part.unflatten(-1, (-1, width)) for part in (query, key, value))
        out = attention(self.turn(query), self.turn(key), value, self.config.softmax_scale, mask)
        return self.linear(name + "o_proj", out.flatten(2))

    def feed_forward(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.mlp."
        if not self.config.is_expert_layer(layer):
            return feed_forward(x, *self._swiglu(name))
        tokens = x.flatten(0, 1)
        bias = self.tensors.get(name + "gate.e_score_correction_bias")
        _, chosen, weights = route(self.linear(name + "gate", tokens), bias, self.config)
        self.experts[layer] = chosen
        stacked = (self.tensors[name + "experts.gate_up_proj"], self.tensors[name + "experts.down_proj"])
        out = routed_experts(tokens, chosen, weights, *stacked)
        if self.config.n_shared_experts:
            out = out + feed_forward(tokens, *self._swiglu(name + "shared_experts."))
        return out.view_as(x)

    def _swiglu(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (self.tensors[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
        return gate, up, down
