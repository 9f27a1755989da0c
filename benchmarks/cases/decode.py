"""Decoding: latent attention over a paged cache, experts and linear layers for few tokens, what a token leaves behind.

Peers of attention are FlashMLA and FlashAttention 3 in vLLM's builds, where those lie on the import path; vllm itself
need not be importable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Case
from benthic.kernels import cache_write, paged_latent_attention
from benthic.kernels.decode_matmul_fp8 import decode_matmul_fp8
from benthic.kernels.expert_decode import few_token_experts, few_token_experts_fp8
from benthic.kernels.few_token_linear import few_token_linear
from benthic.kernels.likeliest import likeliest
from benthic.kernels.paged_attention import paged_attention
from benthic.kernels.paged_latent_attention_fp8 import absorbed_paged_attention_fp8
from benthic.numerics.reference import cache_write as cache_write_reference
from benthic.numerics.reference.decode_matmul_fp8 import decode_matmul_fp8 as plain_matmul_fp8
from benthic.numerics.reference.expert_decode import few_token_experts as plain_experts
from benthic.numerics.reference.expert_decode import few_token_experts_fp8 as plain_experts_fp8
from benthic.numerics.reference.likeliest import likeliest as plain_likeliest
from benthic.numerics.reference.paged_latent_attention_fp8 import pack, unpack
from benthic.numerics.reference.quantise import quantise_weights
from benthic.ops.experts import routed_experts
from benthic.ops.swiglu import swiglu

C, R, BLOCK = 512, 64, 64
ATTENTION = (
    (128, 128, 1, 4096), (128, 64, 1, 4096), (128, 16, 1, 4096), (32, 128, 1, 8192), (1, 128, 1, 32768),
    (1, 16, 1, 1024), (8, 16, 1, 1024), (32, 16, 1, 1024), (128, 16, 1, 768), (256, 16, 1, 768), (256, 16, 2, 768),
)  # fmt: skip
"""Sequences, heads, query rows of a sequence, keys: V3's on one and eight GPUs, and V2-Lite's at its batches."""
LITE, LITE_INNER, LITE_EXPERTS, LITE_CHOSEN = 2048, 1408, 64, 6
LITE_LINEAR = ((3648, LITE), (LITE, LITE), (LITE_EXPERTS, LITE))
"""Out and in of V2-Lite's joined first projections, its output projection and its router."""
LINEAR = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))
"""Out and in of V3's projections: q_a and kv_a, q_b, o, an expert's gate and up, its down."""
TOLERANCE = 1e-2


def cases(device: str) -> Iterator[Case]:
    """Every case, made when asked for."""
    for shape in ATTENTION:
        yield _latent_attention(*shape, device)
    for shape in ((128, 128, 4096), (128, 64, 4096), (128, 16, 4096), (1, 128, 32768), (256, 16, 768)):
        yield _latent_attention_fp8(*shape, device)
    for batch, heads, key_heads, length in ((32, 32, 8, 4096), (128, 32, 8, 1024), (1, 32, 8, 32768)):
        yield _plain_attention(batch, heads, key_heads, length, device)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        yield _experts(tokens, LITE, LITE_INNER, LITE_EXPERTS, LITE_CHOSEN, device)
    for tokens in (1, 2, 8, 32):
        yield _experts_and_shared(tokens, device)
    for tokens in (1, 2, 4):
        for out, into in LITE_LINEAR:
            yield _linear(tokens, out, into, device)
    for rows in (1, 32, 256):
        yield _likeliest(rows, device)
    for tokens in (1, 8, 32):
        yield _experts_fp8(tokens, LITE, LITE_INNER, LITE_EXPERTS, LITE_CHOSEN, device)
        yield _experts_fp8(tokens, 7168, 2048, 32, 8, device)
    for out, into in LINEAR:
        for tokens in (1, 16, 64):
            yield _linear_fp8(tokens, out, into, device)
    for tokens in (1, 128):
        yield _written(tokens, 16, device)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _paged(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Blocks of all sequences in random order (int32 [B, blocks]) and each one's length (int32 [B])."""
    blocks = -(-length // BLOCK)
    tables = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
    return tables, torch.full((batch,), length, dtype=torch.int32, device=device)


def _latent_attention(batch: int, heads: int, rows: int, length: int, device: str) -> Case:
    """Bytes: each latent row once, queries and results; FLOPs: scores over C + R, results over C."""
    tables, lengths = _paged(batch, length, device)
    pool = _noise(device, tables.numel(), BLOCK, C + R)
    query = _noise(device, batch * rows, heads, C + R)
    starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device)
    scale = 192**-0.5
    arguments = query, pool, tables, starts, lengths, scale, C
    some = (0, batch - 1)

    def exact(sequence: int) -> Tensor:
        keys = pool[tables[sequence].long()].view(-1, C + R)[:length].float()
        scores = query.view(batch, rows, heads, -1)[sequence].float() @ keys.T * scale  # [n, H, L]
        hidden = torch.ones(rows, length, dtype=torch.bool, device=device).triu(length - rows + 1)
        return scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1) @ keys[:, :C]

    expected = torch.stack([exact(sequence) for sequence in some])
    runs: dict[str, Callable[[], Tensor]] = {
        "benthic": lambda: paged_latent_attention.absorbed_paged_attention(*arguments),
        "benthic Triton": lambda: paged_latent_attention.in_triton(*arguments),
    }
    if _loaded("vllm/_flashmla_C.abi3.so"):
        runs["FlashMLA"] = _flash_mla(query.view(batch, rows, heads, -1), pool, tables, lengths, scale)
    if _loaded("vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"):
        runs["FlashAttention 3"] = _flash_attention_3(query.view(batch, rows, heads, -1), pool, tables, lengths, scale)
    return Case(
        "latent attention, paged", f"{batch} x {length} keys, {heads} heads, {rows} rows", runs,
        lambda out: _error(out.reshape(batch, rows, heads, C)[list(some)], expected), TOLERANCE,
        bytes=2 * (batch * length * (C + R) + batch * rows * heads * (2 * C + R)),
        flops=2 * batch * rows * heads * length * (2 * C + R),
    )  # fmt: skip


def _latent_attention_fp8(batch: int, heads: int, length: int, device: str) -> Case:
    """The peer is our own kernel over bfloat16 latents, which the shape's bytes do not count."""
    tables, lengths = _paged(batch, length, device)
    pool, query = _noise(device, tables.numel(), BLOCK, C + R), _noise(device, batch, heads, C + R)
    small = torch.cat([pack(rows, C) for rows in pool.split(1024)])
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    arguments = tables, starts, lengths, 192**-0.5, C
    keys = unpack(small[tables[0].long()].view(-1, small.shape[2])[:length], C, torch.bfloat16)
    expected = (query[0].float() @ keys.T * 192**-0.5).softmax(-1) @ keys[:, :C]
    return Case(
        "latent attention, paged, e4m3", f"{batch} x {length} keys, {heads} heads",
        {
            "benthic": lambda: absorbed_paged_attention_fp8(query, small, *arguments),
            "benthic on bfloat16": lambda: paged_latent_attention.absorbed_paged_attention(query, pool, *arguments),
        },
        lambda out: _error(out[0], expected), 0.06,
        bytes=batch * length * small.shape[2] + 2 * batch * heads * (2 * C + R),
        flops=2 * batch * heads * length * (2 * C + R),
    )  # fmt: skip


@cache
def _loaded(library: str) -> bool:
    """Whether vLLM's build of `library` lies on the import path; loads it."""
    for build in filter(Path.is_file, (Path(folder, library) for folder in sys.path)):
        torch.ops.load_library(str(build))
        return True
    return False


def _flash_mla(query: Tensor, pool: Tensor, tables: Tensor, lengths: Tensor, scale: float) -> Callable[[], Tensor]:
    """Its plan for these lengths is made once, as engines do once a step for all layers."""
    operator, keys = torch.ops._flashmla_C.dense_decode_fwd, pool[:, :, None]
    arguments = query, keys, C, lengths, tables, scale, query.shape[1] > 1
    _, _, plan, shares = operator(*arguments, None, None, None)
    return lambda: operator(*arguments, plan, shares, None)[0]


def _flash_attention_3(
    query: Tensor, pool: Tensor, tables: Tensor, lengths: Tensor, scale: float
) -> Callable[[], Tensor]:
    """Its latent mode: rotated channels are query and key, latents the second query and the values."""
    rows, keys = query.shape[1], pool[:, :, None]
    longest = tables.shape[1] * BLOCK
    return lambda: torch.ops._vllm_fa3_C.fwd(
        query[..., C:], keys[..., C:], keys[..., :C], None, None, query[..., :C], None, None, None, None, None, lengths,
        rows, longest, tables, None, None, None, None, None, None, None, None,
        scale, rows > 1, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
    )[0]  # fmt: skip


def _plain_attention(batch: int, heads: int, key_heads: int, length: int, device: str) -> Case:
    width = 128
    tables, lengths = _paged(batch, length, device)
    pool = _noise(device, tables.numel(), BLOCK, 2 * key_heads * width)
    query = _noise(device, batch, heads, width)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    key, value = (
        x.contiguous() for x in pool[tables[0].long()].view(1, -1, 2, key_heads, width).transpose(1, 3).unbind(2)
    )
    expected = F.scaled_dot_product_attention(query[:1, :, None].float(), key.float(), value.float(), enable_gqa=True)
    return Case(
        "attention, paged", f"{batch} x {length} keys, {heads} heads over {key_heads}",
        {"benthic": lambda: paged_attention(query, pool, tables, starts, lengths, width**-0.5, key_heads)},
        lambda out: _error(out[0], expected[0, :, 0]), TOLERANCE,
        bytes=2 * (pool.numel() + 2 * query.numel()), flops=4 * batch * heads * length * width,
    )  # fmt: skip


def _routing(tokens: int, experts: int, chosen: int, device: str) -> tuple[Tensor, Tensor]:
    picks = torch.rand(tokens, experts, device=device).topk(chosen).indices
    return picks, torch.rand(tokens, chosen, device=device)


def _experts(tokens: int, width: int, inner: int, experts: int, chosen: int, device: str) -> Case:
    """Bytes: the chosen experts' weights once. The peer sorts rows and multiplies by torch's grouped product."""
    gate_up, down = _noise(device, experts, 2 * inner, width), _noise(device, experts, width, inner)
    arguments = _noise(device, tokens, width), *_routing(tokens, experts, chosen, device), gate_up, down
    with torch.no_grad():
        expected = routed_experts(*arguments)
    return Case(
        "experts, few tokens", f"{tokens} x {width}, {chosen} of {experts} experts of {inner}",
        {"benthic": lambda: few_token_experts(*arguments), "torch grouped_mm": lambda: _grouped(*arguments)},
        lambda out: _error(out, expected), TOLERANCE,
        bytes=2 * (len(arguments[1].unique()) * 3 * inner * width + 2 * tokens * width),
        flops=6 * tokens * chosen * inner * width,
    )  # fmt: skip


@torch.no_grad()
def _grouped(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    ends = torch.zeros(len(down), dtype=torch.int64, device=x.device).scatter_add_(0, chosen, torch.ones_like(chosen))
    ends = ends.cumsum(0).int()
    hidden = F.grouped_mm(x[order // experts.shape[1]], gate_up.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    placed = torch.empty_like(rows).index_copy_(0, order, rows).view(*experts.shape, -1)
    return (placed.float() * weights[..., None]).sum(1).bfloat16()


def _experts_and_shared(tokens: int, device: str) -> Case:
    """The peer launches the shared network apart, as engines of the field do."""
    shared_inner = 2 * LITE_INNER
    gate_up, down = (_noise(device, LITE_EXPERTS, *shape) for shape in ((shared_inner, LITE), (LITE, LITE_INNER)))
    shared_gate_up, shared_down = _noise(device, 2 * shared_inner, LITE), _noise(device, LITE, shared_inner)
    x, routing = _noise(device, tokens, LITE), _routing(tokens, LITE_EXPERTS, LITE_CHOSEN, device)
    arguments = x, *routing, gate_up, down

    @torch.no_grad()
    def apart() -> Tensor:
        return few_token_experts(*arguments) + F.linear(swiglu(*F.linear(x, shared_gate_up).chunk(2, -1)), shared_down)

    expected = plain_experts(*(one[:1] for one in (x, *routing)), gate_up, down, shared_gate_up, shared_down)
    return Case(
        "routed and shared experts, few tokens", f"{tokens} x {LITE}, {LITE_CHOSEN} of {LITE_EXPERTS} and 2",
        {"benthic": lambda: few_token_experts(*arguments, shared_gate_up, shared_down), "benthic, apart": apart},
        lambda out: _error(out[:1], expected), TOLERANCE,
        bytes=2 * ((len(routing[0].unique()) + 2) * 3 * LITE_INNER * LITE + 2 * tokens * LITE),
        flops=6 * tokens * (LITE_CHOSEN + 2) * LITE_INNER * LITE,
    )  # fmt: skip


def _linear(tokens: int, out: int, into: int, device: str) -> Case:
    x, weight = _noise(device, tokens, into), _noise(device, out, into)
    expected = x.float() @ weight.float().t()
    return Case(
        "linear, few tokens", f"{tokens} x {into} to {out}",
        {"benthic": lambda: few_token_linear(x, weight), "cuBLAS": lambda: F.linear(x, weight)},
        lambda result: _error(result, expected), TOLERANCE,
        bytes=2 * (weight.numel() + tokens * (into + out)), flops=2 * tokens * into * out,
    )  # fmt: skip


def _likeliest(rows: int, device: str) -> Case:
    logits = _noise(device, rows, 102400)
    expected = plain_likeliest(logits)[1][1]
    return Case(
        "likeliest tokens with log-probabilities", f"{rows} x 102400",
        {"benthic": lambda: likeliest(logits)[1][1], "torch": lambda: plain_likeliest(logits)[1][1]},
        lambda found: _error(found, expected), TOLERANCE,
        bytes=2 * logits.numel() + 32 * rows,
    )  # fmt: skip


def _experts_fp8(tokens: int, width: int, inner: int, experts: int, chosen: int, device: str) -> Case:
    """The peer is our own kernel on bfloat16 weights, which the shape's bytes do not count."""
    gate_up, down = _noise(device, experts, 2 * inner, width), _noise(device, experts, width, inner)
    picks, weights = _routing(tokens, experts, chosen, device)
    x = _noise(device, tokens, width)
    quantised = *quantise_weights(gate_up), *quantise_weights(down)
    expected = plain_experts_fp8(x[:1], picks[:1], weights[:1], *quantised)
    return Case(
        "experts in FP8, few tokens", f"{tokens} x {width}, {chosen} of {experts} experts of {inner}",
        {
            "benthic": lambda: few_token_experts_fp8(x, picks, weights, *quantised),
            "benthic on bfloat16": lambda: few_token_experts(x, picks, weights, gate_up, down),
        },
        # Against weights that were not rounded the error is that of e4m3.
        lambda out: _error(out[:1], expected), 0.06,
        bytes=len(picks.unique()) * 3 * inner * width + 4 * tokens * width,
        flops=6 * tokens * chosen * inner * width,
    )  # fmt: skip


def _linear_fp8(tokens: int, out: int, into: int, device: str) -> Case:
    x, weight = _noise(device, tokens, into), _noise(device, out, into)
    values, scales = (tensor[0].contiguous() for tensor in quantise_weights(weight[None]))
    expected = plain_matmul_fp8(x, values, scales)
    return Case(
        "linear in FP8, few tokens", f"{tokens} x {into} to {out}",
        {
            "benthic": lambda: decode_matmul_fp8(x, values, scales),
            "cuBLAS bfloat16": lambda: F.linear(x, weight),
        },
        lambda result: _error(result, expected), 0.06,
        bytes=values.numel() + 2 * tokens * (into + out), flops=2 * tokens * into * out,
    )  # fmt: skip


def _written(tokens: int, heads: int, device: str) -> Case:
    projected, query = _noise(device, tokens, C + R), _noise(device, tokens, heads, 128 + R)
    weight, angles = _noise(device, C), torch.rand(4096, R // 2, device=device)
    rotations = torch.polar(torch.ones_like(angles), angles)
    positions = torch.randint(4096, (tokens,), device=device)
    slots = torch.randperm(256 * BLOCK, device=device)[:tokens]
    pool, absorbed = torch.zeros(256, BLOCK, C + R, device=device).bfloat16(), _noise(device, tokens, heads, C + R)
    arguments = query, projected, weight, 1e-6, rotations, positions, slots, pool, absorbed, True

    def ours() -> tuple[Tensor, Tensor]:
        cache_write.turn_and_write_latents(*arguments)
        return pool.view(-1, C + R)[slots], absorbed[..., C:]

    def plain() -> tuple[Tensor, Tensor]:
        cache_write_reference.turn_and_write_latents(*arguments)
        return pool.view(-1, C + R)[slots], absorbed[..., C:]

    expected = tuple(tensor.clone() for tensor in plain())
    pool.zero_()
    return Case(
        "cache row written, queries turned", f"{tokens} tokens, {heads} heads", {"benthic": ours, "torch": plain},
        lambda out: max(_error(a, b) for a, b in zip(out, expected, strict=True)), TOLERANCE,
        bytes=2 * tokens * (2 * (C + R) + 2 * heads * R),
    )  # fmt: skip
