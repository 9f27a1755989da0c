"""FP8 at DeepSeek-V3's shapes: quantisation, what is fused with it, and products, dense and by experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernels_fp8
from benchmarks.kernel_case import Case
from benthic.kernels import quantise, retile, swiglu_fp8
from benthic.kernels.grouped_matmul_fp8 import grouped_matmul_fp8
from benthic.kernels.grouped_weight_gradient_fp8 import grouped_weight_gradient_fp8, token_groups
from benthic.numerics.reference import quantise as plain
from benthic.numerics.reference import swiglu_fp8 as plain_swiglu

TOKENS, WIDTH, INNER, CHOSEN = 32_768, 7_168, 2_048, 8
DENSE = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
"""Out and in of V3's projections, for 4,096 tokens: q_a and kv_a, q_b, kv_b, o, an expert's gate and up, its down."""
E4M3 = 0.03
"""Relative error of a tensor in e4m3 with a scale for 128 of its elements."""
EXACT = 3e-3
"""Relative error of a product of FP8 operands that are given: the result's bfloat16."""
OTHER_OPERANDS = 20.0
"""How much further a product of operands that were not rounded, or rounded otherwise, may be."""


def cases(device: str) -> Iterator[Case]:
    """Every case, made when asked for."""
    yield from _quantised(device)
    yield from _retiled(device)
    yield from _activated(device)
    deep_gemm = _deep_gemm()
    for out, into in DENSE:
        yield _dense(device, 4096, out, into, deep_gemm)
        yield _dense_gradient(device, 4096, out, into)
    for make, groups in ((_forward, kernels_fp8.FORWARD_GROUPS), (_gradient, kernels_fp8.GRADIENT_GROUPS)):
        for experts, tokens in groups:
            for shape in kernels_fp8.SHAPES:
                yield make(experts, tokens, shape, deep_gemm)


def _deep_gemm() -> ModuleType | None:
    """Installed, or as the vLLM build on the import path ships it; vllm itself need not be importable."""
    if find_spec("deep_gemm") is None:
        folders = (Path(folder) for folder in sys.path)
        found = next((folder for folder in folders if (folder / "vllm/third_party/deep_gemm").is_dir()), None)
        return kernels_fp8.load_deep_gemm(found)
    import deep_gemm

    return deep_gemm


def _noise(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _rows_error(result: tuple[Tensor, ...], expected: Tensor) -> float:
    rows = len(expected)
    return _error(plain.dequantise_rows(result[0][:rows], result[1][:, :rows]), expected)


def _columns_error(result: tuple[Tensor, ...], expected: Tensor) -> float:
    """Of the first block of 128 tokens, `expected` [128, C]."""
    return _error(plain.dequantise_rows(result[0][:, :128], result[1][:1]), expected.T)


def _quantised(device: str) -> Iterator[Case]:
    x, shape = _noise(device, TOKENS, WIDTH), f"{TOKENS}x{WIDTH}"
    ends = torch.arange(1, 9, device=device, dtype=torch.int32) * (TOKENS // 8)
    size = int(x.numel() * (3 + 4 / 128))
    compiled = torch.compile(partial(plain.quantise_rows, power_of_two=True), dynamic=False)
    runs = {"benthic": lambda: quantise.quantise_rows(x, power_of_two=True), "torch.compile": lambda: compiled(x)}
    yield Case("quantise 1x128", shape, runs, lambda out: _rows_error(out, x[:512]), E4M3, size)
    runs = {
        "benthic": lambda: quantise.quantise_columns(x, ends),
    }
    yield Case("quantise 128x1, transposed", shape, runs, lambda out: _columns_error(out, x[:128]), E4M3, size)
    weight = _noise(device, 8, 4096, WIDTH)

    def error(out: tuple[Tensor, ...]) -> float:
        return _error(plain.dequantise_weights(out[-2][:1], out[-1][:1]), weight[:1].transpose(1, 2))

    runs = {"benthic": lambda: quantise.quantise_weights_with_transpose(weight)}
    yield Case("quantise 128x128, and transposed", "8x4096x7168", runs, error, E4M3, 4 * weight.numel())


def _retiled(device: str) -> Iterator[Case]:
    x, shape = _noise(device, TOKENS, WIDTH), f"{TOKENS}x{WIDTH}"
    values, scales = quantise.quantise_rows(x, power_of_two=True)
    ends = torch.arange(1, 9, device=device, dtype=torch.int32) * (TOKENS // 8)
    size = 2 * _bytes(values, scales)
    runs: dict[str, Callable[[], Any]] = {
        "benthic": lambda: retile.retile_columns(values, scales, ends),
        "from bfloat16": lambda: quantise.quantise_columns(x, ends),
    }
    yield Case("re-tile 1x128 to 128x1", shape, runs, lambda out: _columns_error(out, x[:128]), 1.5 * E4M3, size)
    count = TOKENS // 4  # each of them chosen by CHOSEN experts
    values, scales = values[:count], scales[:, :count].contiguous()
    tokens = torch.randperm(count * CHOSEN, device=device) // CHOSEN
    ends = torch.arange(1, 33, device=device, dtype=torch.int32) * (len(tokens) // 32)
    name = f"{count}x{WIDTH}, each {CHOSEN} times"
    runs = {
        "benthic": lambda: retile.retile_columns(values, scales, ends, tokens),
    }
    size = (1 + CHOSEN) * _bytes(values, scales)
    rows = tokens[:128]
    yield Case("take rows, re-tile", name, runs, lambda out: _columns_error(out, x[rows]), 1.5 * E4M3, size)
    as_bytes = values.view(torch.uint8)

    def indexed() -> tuple[Tensor, Tensor]:
        return as_bytes.index_select(0, tokens).view(torch.float8_e4m3fn), scales.index_select(1, tokens)

    runs = {"benthic": lambda: retile.take_quantised_rows(values, scales, tokens), "torch index_select": indexed}
    yield Case("take FP8 rows", name, runs, lambda out: _rows_error(out, x[rows]), 1.5 * E4M3, size)


def _activated(device: str) -> Iterator[Case]:
    rows = TOKENS // 4 * CHOSEN
    hidden, gradient = _noise(device, rows, 2 * INNER), _noise(device, rows, INNER)
    weights, shape = torch.rand(rows, device=device), f"{rows}x{INNER}"
    expected, _, kept, kept_scales = plain_swiglu.swiglu_quantised(hidden[:512], weights[:512])
    expected = plain.dequantise_rows(expected, _)
    forward = torch.compile(plain_swiglu.swiglu_quantised, dynamic=False)
    runs: dict[str, Callable[[], Any]] = {
        "benthic": lambda: swiglu_fp8.swiglu_quantised(hidden, weights),
        "torch.compile": lambda: forward(hidden, weights),
    }
    size = 7 * rows * INNER
    yield Case("SwiGLU, quantised", shape, runs, lambda out: _rows_error(out, expected), E4M3, size)
    wanted = plain_swiglu.swiglu_gradient(gradient[:512], kept, kept_scales, weights[:512])[0]
    _, _, kept, kept_scales = swiglu_fp8.swiglu_quantised(hidden, weights)
    backward = torch.compile(plain_swiglu.swiglu_gradient_quantised, dynamic=False)
    runs = {
        "benthic": lambda: swiglu_fp8.swiglu_gradient_quantised(gradient, kept, kept_scales, weights),
        "torch.compile": lambda: backward(gradient, kept, kept_scales, weights),
    }
    # As many bytes: a gradient of 2 and 2 kept in, 2 and the activation again out.
    yield Case("SwiGLU backward, quantised", shape, runs, lambda out: _rows_error(out, wanted), 1.5 * E4M3, size)


def _dense(device: str, tokens: int, out: int, into: int, deep_gemm: ModuleType | None) -> Case:
    x, matrix = _noise(device, tokens, into), _noise(device, 1, out, into)
    values, scales = quantise.quantise_rows(x)
    weight, weight_scales = quantise.quantise_weights(matrix)
    ends = torch.full((1,), tokens, dtype=torch.int32, device=device)
    expected = plain.dequantise_rows(values[-64:], scales[:, -64:])
    expected = expected @ plain.dequantise_weights(weight, weight_scales)[0].T
    kind = F.ScalingType
    runs: dict[str, Callable[[], Any]] = {
        "benthic": _judged(lambda: grouped_matmul_fp8(values, scales, weight, weight_scales, ends)),
        "torch bf16": _judged(lambda: F.linear(x, matrix[0]), OTHER_OPERANDS),
    }  # fmt: skip
    if out % 128 == 0:  # its scales know no ragged blocks
        runs["torch scaled_mm"] = _judged(
            lambda: F.scaled_mm(
                values, weight[0].T, scales.T, kind.BlockWise1x128, weight_scales[0].T, kind.BlockWise128x128,
                output_dtype=torch.bfloat16,
            )
        )  # fmt: skip
    if deep_gemm is not None:
        into_this = x.new_empty(tokens, out)

        def deep() -> Tensor:
            deep_gemm.fp8_gemm_nt((values, scales.T), (weight[0], weight_scales[0]), into_this)
            return into_this

        runs["DeepGEMM"] = _judged(deep)
    size = _bytes(values, scales, weight, weight_scales) + 2 * tokens * out
    flops = 2 * tokens * out * into
    return Case(
        "dense FP8", f"{tokens}x{out}x{into}", runs, lambda found: _verdict(found, lambda y: _error(y[-64:], expected)),
        EXACT, size, flops, "fp8",
    )  # fmt: skip


def _dense_gradient(device: str, tokens: int, out: int, into: int) -> Case:
    x, gradient = _noise(device, tokens, into), _noise(device, tokens, out)
    groups = token_groups(tokens, out, into, torch.device(device))
    even = [torch.arange(1, count + 1, device=device).mul(tokens // count).int() for count in (1, groups)]
    for ends in even:
        ends[-1] = tokens
    operands = [(*quantise.quantise_columns(gradient, ends), *quantise.quantise_columns(x, ends)) for ends in even]
    left, left_scales, right, right_scales = operands[0]
    expected = plain.dequantise_rows(left[:64, :tokens], left_scales[: tokens // 128, :64])
    expected = expected @ plain.dequantise_rows(right[:, :tokens], right_scales[: tokens // 128]).T

    def split() -> Tensor:
        if groups == 1:
            return grouped_weight_gradient_fp8(*operands[1], even[1], torch.bfloat16)[0]
        return grouped_weight_gradient_fp8(*operands[1], even[1]).sum(0).bfloat16()

    runs = {
        "benthic": _judged(split, OTHER_OPERANDS if groups > 1 else 1.0),
        "benthic, one group": _judged(lambda: grouped_weight_gradient_fp8(*operands[0], even[0], torch.bfloat16)[0]),
        "torch bf16": _judged(lambda: gradient.T @ x, OTHER_OPERANDS),
    }
    size = _bytes(left, left_scales, right, right_scales) + 2 * out * into
    return Case(
        f"dense FP8 weight gradient, {groups} groups of tokens", f"{out}x{into}x{tokens}", runs,
        lambda found: _verdict(found, lambda y: _error(y[:64], expected)), EXACT, size, 2 * tokens * out * into, "fp8",
    )  # fmt: skip


def _forward(experts: int, tokens: int, shape: tuple[int, int], deep_gemm: ModuleType | None) -> Case:
    """Also the input gradient's product: it differs in nothing but the widths."""
    (out, into), rows = shape, experts * tokens
    made = kernels_fp8.forward_case("", experts, tokens, out, into, False, deep_gemm)
    size = rows * into + experts * out * into + 2 * rows * out
    return _of_experts("grouped FP8", f"{experts}x{tokens} {out}x{into}", made, "benthic fp8", size)


def _gradient(experts: int, tokens: int, shape: tuple[int, int], deep_gemm: ModuleType | None) -> Case:
    (out, into), rows = shape, experts * tokens
    made = kernels_fp8.gradient_case("", experts, tokens, out, into, False, deep_gemm)
    size = rows * (out + into) + 2 * experts * out * into
    name = f"{experts}x{tokens} {out}x{into}"
    return _of_experts("grouped FP8 weight gradient", name, made, "benthic fp8, bf16 result", size)


def _of_experts(operation: str, shape: str, made: kernels_fp8.Case, ours: str, size: int) -> Case:
    runs = {"benthic": _judged(made.subjects[ours])}
    for name, call in made.subjects.items():
        if name != ours:
            runs[name] = _judged(call, made.tolerances.get(name, EXACT) / EXACT)
    return Case(operation, shape, runs, lambda found: _verdict(found, made.error), EXACT, size, int(made.flop), "fp8")


def _judged(call: Callable[[], Tensor], slack: float = 1.0) -> Callable[[], tuple[Tensor, float]]:
    """`call`, whose error may be `slack` times the tolerance."""
    return lambda: (call(), slack)


def _verdict(found: tuple[Tensor, float], error: Callable[[Tensor], float]) -> float:
    return error(found[0]) / found[1]
