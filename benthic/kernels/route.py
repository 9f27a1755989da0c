"""Choosing experts in one launch: scores, bias, groups, the best K, normalisation and scaling, all in fp32.

A program holds the scores of a few tokens as [tokens, groups, experts of a group], both padded to powers of two.
Experts come best first, and of equals the lower number wins, groups likewise: as the reference has it, and one of the
orders that torch.topk allows. A score that is NaN, or -inf, is the last choice and still names an expert, so that a
run that diverges fails on its loss and not on an address.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benthic.config.model import ModelConfig


def route(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """logits fp32 [T, E], bias fp32 [E] -> scores fp32 [T, E], experts int64 [T, K], weights fp32 [T, K]."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    chosen = config.num_experts_per_tok
    limited = config.topk_method != "greedy" and config.topk_group < config.n_group
    groups = config.n_group if limited else 1
    scores = torch.empty_like(logits)
    picked = logits.new_empty((tokens, chosen), dtype=torch.int64)
    weights = logits.new_empty((tokens, chosen))
    if tokens:
        padded = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
        # Few tokens: one a warp, which passes nothing through shared memory.
        tile, warps = (1, 1) if tokens <= 256 else (_tokens_of(padded[0] * padded[1]), 4)
        _forward[(triton.cdiv(tokens, tile),)](
            logits, bias, scores, picked, weights, tokens, config.routed_scaling_factor,
            G=groups, S=experts // groups, GROUPS=padded[0], SIZE=padded[1], KEPT=config.topk_group if limited else 1,
            TOP_TWO=config.topk_method == "noaux_tc", K=chosen, CHOSEN=triton.next_power_of_2(chosen),
            SIGMOID=config.scoring_func == "sigmoid", NORMALISE=config.norm_topk_prob, TOKENS=tile,
            num_warps=warps,
        )  # fmt: skip
    return scores, picked, weights


def route_backward(
    grad_scores: Tensor | None, grad_weights: Tensor | None, scores: Tensor, experts: Tensor, config: ModelConfig
) -> Tensor:
    """d logits fp32 [T, E] from the gradients of scores and weights (None: zero) and what `route` returned."""
    tokens, width = scores.shape
    grad_logits = torch.empty_like(scores)
    if tokens:
        padded = triton.next_power_of_2(width)
        tile = _tokens_of(padded)
        _backward[(triton.cdiv(tokens, tile),)](
            None if grad_scores is None else grad_scores.contiguous(),
            None if grad_weights is None else grad_weights.contiguous(),
            scores, experts, grad_logits, tokens, width, config.routed_scaling_factor,
            K=experts.shape[1], CHOSEN=triton.next_power_of_2(experts.shape[1]), EXPERTS=padded,
            SIGMOID=config.scoring_func == "sigmoid", NORMALISE=config.norm_topk_prob, TOKENS=tile, num_warps=4,
        )  # fmt: skip
    return grad_logits


def _tokens_of(width: int) -> int:
    """Tokens of a program: eight scores a thread, where that many fit."""
    return max(1, 1024 // width)


@triton.jit(do_not_specialize=["T"])
def _forward(
    logits, bias, scores, picked, weights, T, scale,
    G: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
    TOP_TWO: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    NEVER: tl.constexpr = float("-inf")
    LAST: tl.constexpr = -1e38  # twice this is still finite
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    g = tl.arange(0, GROUPS)
    s = tl.arange(0, SIZE)
    e = (g[:, None] * S + s[None, :])[None, :, :]
    real = ((g < G)[:, None] & (s < S)[None, :])[None, :, :]
    inside = (t < T)[:, None, None] & real
    at = t[:, None, None].to(tl.int64) * (G * S) + e
    logit = tl.where(real, tl.load(logits + at, mask=inside, other=0.0), NEVER)  # [TOKENS, GROUPS, SIZE]
    if SIGMOID:
        score = tl.sigmoid(logit)
    else:
        top = tl.max(tl.max(logit, 2), 1)
        exponential = tl.exp(logit - top[:, None, None])
        score = exponential / tl.sum(tl.sum(exponential, 2), 1)[:, None, None]
    tl.store(scores + at, score, mask=inside)

    choice = score
    if bias is not None:
        choice += tl.load(bias + e, mask=real, other=0.0)
    choice = tl.where(real, tl.where(choice > LAST, choice, LAST), NEVER)
    if KEPT < G:
        group, best = tl.max(choice, 2, return_indices=True)  # [TOKENS, GROUPS]
        if TOP_TWO:
            group += tl.max(tl.where(s[None, None, :] == best[:, :, None], NEVER, choice), 2)
        kept = tl.zeros([TOKENS, GROUPS], tl.int32)
        for _ in range(KEPT):
            _best, winner = tl.max(group, 1, return_indices=True)
            won = g[None, :] == winner[:, None]
            kept = tl.where(won, 1, kept)
            group = tl.where(won, NEVER, group)
        choice = tl.where(kept[:, :, None] == 1, choice, NEVER)

    choice = tl.reshape(choice, [TOKENS, GROUPS * SIZE])
    score = tl.reshape(score, [TOKENS, GROUPS * SIZE])
    place = tl.arange(0, GROUPS * SIZE)
    k = tl.arange(0, CHOSEN)
    weight = tl.zeros([TOKENS, CHOSEN], tl.float32)
    expert = tl.zeros([TOKENS, CHOSEN], tl.int32)
    for i in range(K):
        _best, winner = tl.max(choice, 1, return_indices=True)
        won = place[None, :] == winner[:, None]
        value = tl.sum(tl.where(won, score, 0.0), 1)
        weight = tl.where(k[None, :] == i, value[:, None], weight)
        expert = tl.where(k[None, :] == i, (winner // SIZE * S + winner % SIZE)[:, None], expert)
        choice = tl.where(won, NEVER, choice)
    if NORMALISE:
        weight = weight / (tl.sum(weight, 1) + 1e-20)[:, None]
    at = t[:, None].to(tl.int64) * K + k[None, :]
    inside = (t < T)[:, None] & (k < K)[None, :]
    tl.store(picked + at, expert.to(tl.int64), mask=inside)
    # torch.compile passes Python's floats as float64.
    tl.store(weights + at, (weight * scale).to(tl.float32), mask=inside)


@triton.jit
def _backward(
    grad_scores, grad_weights, scores, picked, grad_logits, T, E, scale,
    K: tl.constexpr, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    k = tl.arange(0, CHOSEN)
    row = t[:, None].to(tl.int64)
    inside = (t < T)[:, None] & (e < E)[None, :]
    at = row * E + e[None, :]
    score = tl.load(scores + at, mask=inside, other=0.0)  # [TOKENS, EXPERTS]
    grad = tl.zeros([TOKENS, EXPERTS], tl.float32)
    if grad_scores is not None:
        grad = tl.load(grad_scores + at, mask=inside, other=0.0)
    if grad_weights is not None:
        chosen = (t < T)[:, None] & (k < K)[None, :]
        expert = tl.load(picked + row * K + k[None, :], mask=chosen, other=0).to(tl.int32)
        grad_value = tl.load(grad_weights + row * K + k[None, :], mask=chosen, other=0.0)  # [TOKENS, CHOSEN]
        grad_value = (grad_value * scale).to(tl.float32)
        if NORMALISE:
            value = tl.load(scores + row * E + expert, mask=chosen, other=0.0)
            total = (tl.sum(value, 1) + 1e-20)[:, None]
            grad_value = (grad_value - tl.sum(grad_value * (value / total), 1)[:, None]) / total
            grad_value = tl.where(chosen, grad_value, 0.0)
        for i in range(K):
            mine = tl.sum(tl.where(k[None, :] == i, expert, 0), 1)
            value_i = tl.sum(tl.where(k[None, :] == i, grad_value, 0.0), 1)
            grad += tl.where(e[None, :] == mine[:, None], value_i[:, None], 0.0)
    if SIGMOID:
        grad = grad * score * (1.0 - score)
    else:
        grad = score * (grad - tl.sum(grad * score, 1)[:, None])
    tl.store(grad_logits + at, grad, mask=inside)
