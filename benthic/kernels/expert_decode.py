"""Routed experts for few tokens: the weights of the chosen experts are read once, and their bytes set the pace.

Nothing is sorted. A program stands for one expert, or where there are fewer (token, choice) pairs for one of those and
its expert, and a tile of rows of the expert's weights. It works for all pairs that chose the expert, unless there are
none or an earlier pair's program does, with the weights as the tensor cores' rows and the tokens as their 16 or 32
columns. Three launches: hidden rows, a row of outputs a pair, and the sum over choices in their order, so that results
do not depend on what ran first; one token takes two. The host never waits.

Weights are bfloat16, or e4m3 with a float32 factor a block of 128 x 128 (DeepSeek-V3's checkpoints), turned into
bfloat16 in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAIRS = 1024
"""Every program looks through all pairs."""

ROWS, STAGES = 32, 4
"""Rows of weights of a program. One token's 6 experts of 1,408 are 264 programs, two a multiprocessor; with 64 rows
e4m3 weights would pass through registers before they reach the tensor cores, and nothing would be loaded ahead."""


def few_token_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """x [T, D], experts [T, K], weights float32 [T, K], gate_up_proj [E, 2F, D], down_proj [E, D, F] -> [T, D].

    sum_k down(weights[t, k] * silu(gate x) * up x) of experts[t, k], in x's dtype; products are summed in float32.
    T K may be up to 1,024.
    """
    return _run(x, experts, weights, gate_up_proj, None, down_proj, None)


def few_token_experts_fp8(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_scales: Tensor,
    down_proj: Tensor,
    down_scales: Tensor,
) -> Tensor:
    """few_token_experts with weights float8_e4m3fn and the factors that give them back, one for 128 x 128.

    gate_up_scales float32 [E, 2 ceil(F / 128), ceil(D / 128)], the gate's blocks first; down_scales float32
    [E, ceil(D / 128), ceil(F / 128)]. x and the hidden rows stay bfloat16.
    """
    width, inner = x.shape[1], down_proj.shape[2]
    _require_scales("gate_up_scales", gate_up_scales, (len(down_proj), 2 * _blocks(inner), _blocks(width)))
    _require_scales("down_scales", down_scales, (len(down_proj), _blocks(width), _blocks(inner)))
    return _run(x, experts, weights, gate_up_proj, gate_up_scales, down_proj, down_scales)


def _run(x, experts, weights, gate_up_proj, gate_up_scales, down_proj, down_scales) -> Tensor:
    _check(x, experts, weights, gate_up_proj, down_proj)
    tokens, width = x.shape
    chosen = experts.shape[1]
    pairs, inner = tokens * chosen, down_proj.shape[2]
    out = torch.empty_like(x)
    if not tokens:
        return out
    hidden = x.new_empty((pairs, inner))
    padded_pairs = triton.next_power_of_2(pairs)
    programs = min(pairs, len(down_proj))
    common = {
        "CHOSEN": chosen, "PAIRS": padded_pairs, "CHUNK": min(padded_pairs, 256), "COLUMNS": 16 if tokens <= 16 else 32,
        "ROWS": ROWS, "DEPTH": 128, "SCALED": gate_up_scales is not None,
        "EVERY": pairs > len(down_proj), "num_warps": 4, "num_stages": STAGES,
    }  # fmt: skip
    _hidden[(triton.cdiv(inner, ROWS), programs)](
        x, experts, weights, gate_up_proj, gate_up_scales, hidden, pairs, D=width, F=inner,
        ALONE=tokens == 1, **common,
    )  # fmt: skip
    if tokens == 1:
        _outputs_of_one[(triton.cdiv(width, 16),)](
            hidden, experts, down_proj, down_scales, out, D=width, F=inner, CHOSEN=chosen, ROWS=16,
            DEPTH=256 if down_scales is None else 128, SCALED=down_scales is not None, num_warps=4, num_stages=11,
        )  # fmt: skip
        return out
    rows = x.new_empty((pairs, width), dtype=torch.float32)
    _outputs[(triton.cdiv(width, ROWS), programs)](
        hidden, experts, down_proj, down_scales, rows, pairs, D=width, F=inner, **common
    )
    _sum[(tokens, triton.cdiv(width, 256))](rows, out, D=width, CHOSEN=chosen, BLOCK=256, num_warps=2)
    return out


def _blocks(width: int) -> int:
    return triton.cdiv(width, 128)


def _check(x: Tensor, experts: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> None:
    names = {"x": x, "experts": experts, "weights": weights, "gate_up_proj": gate_up_proj, "down_proj": down_proj}
    for name, tensor in names.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not of strides {tensor.stride()}")
    if experts.numel() > MOST_PAIRS:
        raise ValueError(f"{experts.numel()} choices of experts; this kernel is for up to {MOST_PAIRS}")
    count, width, inner = down_proj.shape
    if tuple(gate_up_proj.shape) != (count, 2 * inner, width) or x.shape[1] != width:
        raise ValueError(
            f"x {list(x.shape)}, gate_up_proj {list(gate_up_proj.shape)} and down_proj {list(down_proj.shape)} "
            "do not fit each other"
        )


def _require_scales(name: str, scales: Tensor, shape: tuple[int, ...]) -> None:
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape or not scales.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous torch.float32 {list(shape)}, not {scales.dtype} {list(scales.shape)}"
        )


@triton.jit
def _expert_of(experts, which, PAIRS: tl.constexpr, ALONE: tl.constexpr, EVERY: tl.constexpr):
    """(the program's expert, whether it has work). EVERY: number `which`; else that of pair `which`, unless an earlier
    pair has it too. ALONE: there is one token, whose experts differ, so nothing is compared before weights are loaded.
    """
    works = which >= 0
    if EVERY:
        expert = which.to(tl.int64)
    else:
        expert = tl.load(experts + which).to(tl.int64)
        if not ALONE:
            pair = tl.arange(0, PAIRS)
            works = tl.sum((tl.load(experts + pair, mask=pair < which, other=-1) == expert).to(tl.int32), 0) == 0
    return expert, works


@triton.jit
def _pick(
    experts, expert, which, skipped, pairs, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr
):  # fmt: skip
    """(COLUMNS of the pairs that chose `expert` after the first `skipped`, which columns hold one, how many did)."""
    column = tl.arange(0, COLUMNS)
    picked = column * 0 + which
    found = which * 0 + 1
    if not ALONE:
        picked = column * 0
        found = which * 0
        for start in range(0, pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            same = (tl.load(experts + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)
            place = found + tl.cumsum(same, 0) - 1 - skipped  # among the pairs that chose the expert
            mine = (place[None, :] == column[:, None]) & (same[None, :] > 0)
            picked += tl.sum(tl.where(mine, pair[None, :], 0), 1)
            found += tl.sum(same, 0)
    return picked, skipped + column < found, found


@triton.jit
def _hidden(
    x, experts, weights, gate_up_proj, scales, hidden, pairs, D: tl.constexpr, F: tl.constexpr, CHOSEN: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
    EVERY: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = (D + 127) // 128  # blocks across
    TALL: tl.constexpr = (F + 127) // 128
    which = tl.program_id(1)
    expert, works = _expert_of(experts, which, PAIRS, ALONE, EVERY)
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    gate_at = gate_up_proj + expert * 2 * F * D + f[:, None] * D + depth[None, :]
    gate_scale = scales
    up_scale = scales
    if SCALED:
        gate_scale += (expert * 2 * TALL + tl.program_id(0) * ROWS // 128) * WIDE
        up_scale = gate_scale + TALL * WIDE
    skipped = which * 0
    pair, live, count = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)
    count = tl.where(works, count, 0)
    while skipped < count:
        x_at = x + (pair // CHOSEN)[:, None] * D + depth[None, :]
        gate = tl.zeros((ROWS, COLUMNS), tl.float32)
        up = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, D, DEPTH):
            rows = tl.trans(tl.load(x_at + k, mask=live[:, None] & (k + depth < D)[None, :], other=0.0))
            inside = (f < F)[:, None] & (k + depth < D)[None, :]
            gate_tile = tl.load(gate_at + k, mask=inside, other=0.0)
            up_tile = tl.load(gate_at + F * D + k, mask=inside, other=0.0)
            if SCALED:
                gate += tl.dot(gate_tile.to(rows.dtype), rows) * tl.load(gate_scale + k // 128)
                up += tl.dot(up_tile.to(rows.dtype), rows) * tl.load(up_scale + k // 128)
            else:
                gate = tl.dot(gate_tile, rows, gate)
                up = tl.dot(up_tile, rows, up)
        factor = tl.load(weights + pair, mask=live, other=0.0)
        active = gate / (1.0 + tl.exp(-gate)) * up * factor[None, :]
        at = hidden + pair[None, :] * F + f[:, None]
        tl.store(at, active.to(hidden.dtype.element_ty), mask=(f < F)[:, None] & live[None, :])
        skipped += COLUMNS
        if skipped < count:
            pair, live, _ = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)


@triton.jit
def _outputs(
    hidden, experts, down_proj, scales, out, pairs, D: tl.constexpr, F: tl.constexpr, CHOSEN: tl.constexpr,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
    EVERY: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = (F + 127) // 128
    TALL: tl.constexpr = (D + 127) // 128
    which = tl.program_id(1)
    expert, works = _expert_of(experts, which, PAIRS, False, EVERY)
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    weight_at = down_proj + expert * D * F + d[:, None] * F + depth[None, :]
    if SCALED:
        scales += (expert * TALL + tl.program_id(0) * ROWS // 128) * WIDE
    skipped = which * 0
    pair, live, count = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, False)
    count = tl.where(works, count, 0)
    while skipped < count:
        hidden_at = hidden + pair[:, None] * F + depth[None, :]
        result = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, F, DEPTH):
            rows = tl.trans(tl.load(hidden_at + k, mask=live[:, None] & (k + depth < F)[None, :], other=0.0))
            tile = tl.load(weight_at + k, mask=(d < D)[:, None] & (k + depth < F)[None, :], other=0.0)
            if SCALED:
                result += tl.dot(tile.to(rows.dtype), rows) * tl.load(scales + k // 128)
            else:
                result = tl.dot(tile, rows, result)
        at = out + pair[None, :] * D + d[:, None]
        tl.store(at, result, mask=(d < D)[:, None] & live[None, :])
        skipped += COLUMNS
        if skipped < count:
            pair, live, _ = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, False)


@triton.jit
def _sum(rows, out, D: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOSEN):
        total += tl.load(rows + (token * CHOSEN + choice) * D + d, mask=d < D, other=0.0)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _outputs_of_one(
    hidden, experts, down_proj, scales, out, D: tl.constexpr, F: tl.constexpr, CHOSEN: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One token: its experts one after another into the same sum, so that no outputs are left to be added.

    Loads that follow from a loaded number take two stages each (paged_latent_attention): 11 keep five steps in flight.
    """
    STEPS: tl.constexpr = (F + DEPTH - 1) // DEPTH
    TALL: tl.constexpr = (D + 127) // 128
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, 16)
    result = tl.zeros((ROWS, 16), tl.float32)
    for step in range(CHOSEN * STEPS):
        choice = step // STEPS
        k = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        expert = tl.load(experts + choice + d * 0).to(tl.int64)  # [ROWS]: a scalar would not be loaded ahead
        tile_at = down_proj + (expert * D + d)[:, None] * F + k[None, :]
        tile = tl.load(tile_at, mask=(d < D)[:, None] & (k < F)[None, :], other=0.0)
        row_at = hidden + choice * F + k[None, :] + column[:, None] * 0
        row = tl.trans(tl.load(row_at, mask=(column < 1)[:, None] & (k < F)[None, :], other=0.0))
        if SCALED:  # DEPTH is 128
            scale = tl.load(scales + (expert * TALL + d // 128) * STEPS + step % STEPS)
            result += tl.dot(tile.to(row.dtype), row) * scale[:, None]
        else:
            result = tl.dot(tile, row, result)
    tl.store(out + d, tl.sum(result, 1).to(out.dtype.element_ty), mask=d < D)
