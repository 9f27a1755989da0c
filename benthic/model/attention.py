"""Self-attention of a layer: latent (MLA), or with keys and values of their own (MHA, GQA, MQA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex64, Float
from torch import Tensor, nn

from benthic import ops
from benthic.config.model import LATENT_NORM_EPS, ModelConfig
from benthic.model.attention_among import attention_among
from benthic.model.cache import Cache
from benthic.model.pages import Pages
from benthic.model.primitive import Linear, RMSNorm
from benthic.parallel.sequence import Share


@dataclass(frozen=True, slots=True)
class Span:
    """The positions of one forward pass: their rotations, what they may see (None for all before), and the rows of
    tokens before them, if any are kept: of sequences of equal length in a `cache`, or of any sequences in `pages`; or
    held by other processes, which `share` tells of."""

    rotations: Complex64[Tensor, "positions pairs"]
    mask: Bool[Tensor, "batch_or_1 positions keys"] | None = None
    cache: Cache | None = None
    pages: Pages | None = None
    share: Share | None = None


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one latent."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.heads, self.scale = layer, config.num_attention_heads, config.softmax_scale
        self.rank, self.interleaved = config.kv_lora_rank, config.rope_interleave
        self.key_width, self.rotary_width = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_width = config.v_head_dim
        width, placed = config.hidden_size, {"device": device, "dtype": dtype}
        query_rows = self.heads * config.query_head_dim
        self.compresses_queries = config.q_lora_rank is not None
        if self.compresses_queries:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=config.qkv_bias, **placed)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, **placed)
            self.q_b_proj = Linear(config.q_lora_rank, query_rows, bias=False, **placed)
        else:
            self.q_proj = Linear(width, query_rows, bias=False, **placed)
        self.kv_a_proj_with_mqa = Linear(width, self.rank + self.rotary_width, bias=config.qkv_bias, **placed)
        self.kv_a_layernorm = RMSNorm(self.rank, LATENT_NORM_EPS, **placed)
        expanded_rows = self.heads * (self.key_width + config.v_head_dim)
        self.kv_b_proj = Linear(self.rank, expanded_rows, bias=False, **placed)
        self.o_proj = Linear(self.heads * config.v_head_dim, width, bias=config.output_bias, **placed)

    def forward(
        self, hidden: Float[Tensor, "batch positions width"], span: Span
    ) -> Float[Tensor, "batch positions width"]:
        """Expands keys and values when no token came before, else works on the latents."""
        first, latent_and_key = self._first_projections(hidden)
        query = self.q_b_proj(self.q_a_layernorm(first)) if self.compresses_queries else first
        query = query.unflatten(-1, (self.heads, -1))  # [B, S, H, N + R]
        if span.pages is not None:
            return self._paged(query[0], latent_and_key[0], span.pages, span.rotations)
        latent, key = latent_and_key.split_with_sizes((self.rank, self.rotary_width), -1)
        latent = self.kv_a_layernorm(latent)  # [B, S, C]
        if span.share is not None:
            return self.o_proj(attention_among(self, query, latent, key, span, span.share).flatten(2))
        if span.cache is not None:
            if span.cache.length:
                return self._continue(query, latent, key, span, span.cache)
            turned = ops.rotary(key[:, :, None], span.rotations, self.interleaved)
            span.cache.write(self.layer, torch.cat((latent, turned[:, :, 0]), -1))
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))  # [B, S, H, N + V]
        query, key, value = ops.latent_heads(query, expanded, key, span.rotations, self.interleaved)
        out = ops.attention(query, key, value, self.scale, span.mask)
        return self.o_proj(out.flatten(2))

    def _continue(self, query: Tensor, latent: Tensor, key: Tensor, span: Span, cache: Cache) -> Tensor:
        """Attention of tokens that follow cached ones."""
        query, turning = query.split_with_sizes((self.key_width, self.rotary_width), -1)
        # Queries' and keys' rotary channels turn together: half as many small operations.
        turned = ops.rotary(torch.cat((turning, key[:, :, None]), 2), span.rotations, self.interleaved)
        rotary_query, rotary_key = turned.split_with_sizes((self.heads, 1), 2)  # [B, S, H, R], [B, S, 1, R]
        latents = cache.write(self.layer, torch.cat((latent, rotary_key[:, :, 0]), -1))
        expansion = self.kv_b_proj.weight.view(self.heads, -1, self.rank)
        out = ops.absorbed_attention(query, rotary_query, latents, expansion, self.scale, span.mask)
        return self.o_proj(out.flatten(2))

    def _first_projections(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries, or of what they are compressed to; and of the latent with the rotary key."""
        first = self.q_a_proj if self.compresses_queries else self.q_proj
        return first(hidden), self.kv_a_proj_with_mqa(hidden)

    def _paged(self, query: Tensor, projected: Tensor, pages: Pages, rotations: Tensor) -> Tensor:
        """Sequences of few new tokens work on the latents, all in one call; expanding pays for the others.

        `query` [T, H, N + R] and `projected` [T, C + R] are not turned yet; `rotations` are those of all positions.
        """
        pool = pages.pools[self.layer]
        absorbed = query.new_empty((len(query), self.heads, self.rank + self.rotary_width))  # [T, H, C + R]
        norm = self.kv_a_layernorm
        where = (rotations, pages.positions, pages.slots, pool)
        ops.turn_and_write_latents(query, projected, norm.weight, norm.eps, *where, absorbed, self.interleaved)
        narrow = pages.narrower_than(self._rows_worth_expanding)
        rows, parts = pages.bounds[narrow], []
        if narrow:
            parts.append(self._absorbed(query[:rows, :, : self.key_width], absorbed[:rows], pages.front(narrow)))
        for index in range(narrow, len(pages.counts)):
            mine = slice(pages.bounds[index], pages.bounds[index + 1])
            whole = torch.cat((query[mine, :, : self.key_width], absorbed[mine, :, self.rank :]), -1)
            parts.append(self._expanded(whole, pages, index))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)  # [T, H, V]
        return self.o_proj(out.flatten(1))[None]

    def _absorbed(self, query: Tensor, absorbed: Tensor, pages: Pages) -> Tensor:
        """Values [T, H, V] of queries [T, H, N], which move into the latent space, the first channels of `absorbed`."""
        expansion = self.kv_b_proj.weight.view(self.heads, -1, self.rank)
        latent_query = absorbed[..., : self.rank].transpose(0, 1)  # [H, T, C]
        torch.bmm(query.transpose(0, 1), expansion[:, : self.key_width], out=latent_query)
        where = (pages.pools[self.layer], pages.tables, pages.starts, pages.lengths)
        context = ops.absorbed_paged_attention(absorbed, *where, self.scale, self.rank, pages.first)  # [T, H, C]
        return torch.bmm(context.transpose(0, 1), expansion[:, self.key_width :].transpose(1, 2)).transpose(0, 1)

    def _expanded(self, query: Tensor, pages: Pages, index: int) -> Tensor:
        """Values [n, H, V] of one sequence's queries [n, H, N + R], over keys and values of all its rows."""
        length = pages.totals[index]
        where = (pages.pools[self.layer], pages.tables[index : index + 1], length)
        stored = ops.gather_latents(*where, self.rank, query.dtype)[:, pages.first :]
        latent, rotary_key = stored.split_with_sizes((self.rank, self.rotary_width), -1)  # [1, L, C], [1, L, R]
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
        key, value = expanded.split_with_sizes((self.key_width, self.value_width), -1)
        key = torch.cat((key, rotary_key[:, :, None].expand(-1, -1, self.heads, -1)), -1)
        mask = ops.causal_mask(stored.shape[1] - len(query), len(query), query.device)
        return ops.attention(query[None], key, value, self.scale, mask)[0]

    @property
    def _rows_worth_expanding(self) -> int:
        """From how many queries on expanding L keys, L C (N + V) products, is repaid by the shorter query-key products,
        N + R + V in place of 2 C + R."""
        expanded = self.key_width + self.value_width
        saved = 2 * self.rank - expanded
        return self.rank * expanded // saved + 1 if saved > 0 else 2**62


class PlainAttention(nn.Module):
    """Attention whose heads, or groups of heads, have keys and values of their own. With `qk_norm`, queries and keys
    are normalised over their whole width, before they are split into heads (OLMo 2)."""

    def __init__(self, config: ModelConfig, layer: int, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.scale, self.head_width = layer, config.softmax_scale, config.query_head_dim
        self.key_heads, self.interleaved = config.num_key_value_heads, config.rope_interleave
        width, placed = config.hidden_size, {"device": device, "dtype": dtype}
        query_rows, key_rows = config.num_attention_heads * self.head_width, self.key_heads * self.head_width
        self.q_proj = Linear(width, query_rows, bias=config.qkv_bias, **placed)
        self.k_proj = Linear(width, key_rows, bias=config.qkv_bias, **placed)
        self.v_proj = Linear(width, key_rows, bias=config.qkv_bias, **placed)
        self.normalises = config.qk_norm
        if self.normalises:
            self.q_norm = RMSNorm(query_rows, config.rms_norm_eps, **placed)
            self.k_norm = RMSNorm(key_rows, config.rms_norm_eps, **placed)
        self.o_proj = Linear(query_rows, width, bias=config.output_bias, **placed)

    def forward(
        self, hidden: Float[Tensor, "batch positions width"], span: Span
    ) -> Float[Tensor, "batch positions width"]:
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if self.normalises:
            query, key = self.q_norm(query), self.k_norm(key)
        if span.pages is not None:
            return self._paged(query[0], key[0], value[0], span.pages, span.rotations)
        query, key = self._turned(query, span.rotations), self._turned(key, span.rotations)
        if span.cache is not None:
            rows = span.cache.write(self.layer, torch.cat((key.flatten(2), value), -1))
            key, value = rows.chunk(2, -1)
            key = key.unflatten(-1, (self.key_heads, -1))  # [B, L, Hk, Dq]
        out = ops.attention(query, key, value.unflatten(-1, (self.key_heads, -1)), self.scale, span.mask)
        return self.o_proj(out.flatten(2))

    def _paged(self, query: Tensor, key: Tensor, value: Tensor, pages: Pages, rotations: Tensor) -> Tensor:
        """Queries [T, H Dq], keys and values [T, Hk Dq] of all sequences' new tokens, in one call."""
        query, key, value = (rows.view(len(rows), -1, self.head_width) for rows in (query, key, value))
        pool = pages.pools[self.layer]
        where = (rotations, pages.positions, pages.slots, pool)
        turned = ops.turn_and_write_keys(query, key, value, *where, self.interleaved)  # [T, H, Dq]
        where = (pool, pages.tables, pages.starts, pages.lengths)
        out = ops.paged_attention(turned, *where, self.scale, self.key_heads, pages.first)
        return self.o_proj(out.flatten(1))[None]

    def _turned(self, projected: Tensor, rotations: Tensor) -> Tensor:
        heads = projected.view(*projected.shape[:2], -1, self.head_width)  # [B, S, H, Dq]
        return ops.rotary(heads, rotations, self.interleaved)
