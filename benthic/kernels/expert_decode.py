"""Routed experts for few tokens: the weights of the chosen experts are read once, and their bytes set the pace.

Nothing is sorted. A program stands for one expert, or where there are fewer (token, choice) pairs for one of those and
its expert, and a tile of rows of the expert's weights. It works for all pairs that chose the expert, unless there are
none or an earlier pair's program does, with the weights as the tensor cores' rows and the tokens as their 16 or 32
columns. A shared MLP, as wide as S experts, is S more of them that every token chose: its bytes travel with the others'
and it costs no launch. Three launches: hidden rows, a row of outputs a pair, and the sum over choices in their order,
so that results do not depend on what ran first. The host never waits.

Weights are bfloat16, or e4m3 with a float32 factor a block of 128 x 128 (DeepSeek-V3's checkpoints), turned into
bfloat16 in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PAIRS = 2048
"""Every program looks through all pairs."""

ROWS, STAGES = 32, 4
"""Rows of weights of a program. One token's 6 experts of 1,408 are 264 programs, two a multiprocessor, and 384 for the
outputs. With 64 rows e4m3 weights would pass through registers before they reach the tensor cores, and nothing would be
loaded ahead."""


def few_token_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    shared_gate_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """x [T, D], experts [T, K], weights float32 [T, K], gate_up_proj [E, 2F, D], down_proj [E, D, F] -> [T, D].

    sum_k down(weights[t, k] * silu(gate x) * up x) of experts[t, k], in x's dtype; products are summed in float32.
    T K may be up to 2,048. With shared_gate_up [2 S F, D] and shared_down [D, S F], their MLP's output is added.
    """
    shared = None if shared_gate_up is None or shared_down is None else (shared_gate_up, shared_down)
    return _run(x, experts, weights, gate_up_proj, None, down_proj, None, shared)


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


def _run(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_scales: Tensor | None,
    down_proj: Tensor,
    down_scales: Tensor | None,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    _check(x, experts, weights, gate_up_proj, down_proj)
    tokens, width = x.shape
    chosen = experts.shape[1]
    pairs, inner = tokens * chosen, down_proj.shape[2]
    out = torch.empty_like(x)
    if not tokens:
        return out
    shared_gate_up, shared_down = shared or (None, None)
    beside = 0 if shared is None else _shared_count(*shared, down_proj)
    hidden = x.new_empty((pairs + beside * tokens, inner))
    rows = x.new_empty((pairs + beside * tokens, width), dtype=torch.float32)
    padded_pairs = triton.next_power_of_2(pairs)
    programs = min(pairs, len(down_proj)) + beside
    common = {
        "D": width, "F": inner, "CHOSEN": chosen, "SHARED": beside,
        "PAIRS": padded_pairs, "CHUNK": min(padded_pairs, 256), "COLUMNS": 16 if tokens <= 16 else 32,
        "ROWS": ROWS, "DEPTH": 128, "SCALED": gate_up_scales is not None,
        "EVERY": pairs > len(down_proj), "ALONE": tokens == 1, "num_warps": 4, "num_stages": STAGES,
    }  # fmt: skip
    _hidden[(triton.cdiv(inner, ROWS), programs)](
        x, experts, weights, gate_up_proj, gate_up_scales, shared_gate_up, hidden, pairs, tokens, **common
    )
    _outputs[(triton.cdiv(width, ROWS), programs)](
        hidden, experts, down_proj, down_scales, shared_down, rows, pairs, tokens, **common
    )
    _sum[(tokens, triton.cdiv(width, 256))](
        rows, out, tokens, D=width, CHOSEN=chosen, SHARED=beside, BLOCK=256, num_warps=2
    )
    return out


def _shared_count(gate_up: Tensor, down: Tensor, down_proj: Tensor) -> int:
    """As how many experts the shared MLP counts."""
    _, width, inner = down_proj.shape
    count = down.shape[1] // inner
    expected = (2 * count * inner, width), (width, count * inner)
    if not count or (tuple(gate_up.shape), tuple(down.shape)) != expected:
        raise ValueError(
            f"shared_gate_up {list(gate_up.shape)} and shared_down {list(down.shape)} are not as wide as whole experts "
            f"of {inner} at a width of {width}"
        )
    for name, tensor in (("shared_gate_up", gate_up), ("shared_down", down)):
        if not tensor.is_contiguous() or tensor.dtype != down_proj.dtype:
            raise ValueError(
                f"{name} must be contiguous {down_proj.dtype}, not {tensor.dtype} of strides {tensor.stride()}"
            )
    return count


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


@triton.jit(do_not_specialize=["pairs", "tokens"])
def _hidden(
    x, experts, weights, gate_up_proj, scales, shared, hidden, pairs, tokens, D: tl.constexpr, F: tl.constexpr,
    CHOSEN: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, SCALED: tl.constexpr, EVERY: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1) - SHARED  # the shared ones come first: they have every token
    if SHARED > 0:
        if which < 0:
            _hidden_of_shared(x, shared, hidden, which + SHARED, pairs, tokens, D, F, SHARED, COLUMNS, ROWS, DEPTH)
        else:
            _hidden_of_routed(
                x, experts, weights, gate_up_proj, scales, hidden, which, pairs, D, F, CHOSEN, PAIRS, COLUMNS, ROWS,
                DEPTH, SCALED, EVERY, CHUNK, ALONE,
            )  # fmt: skip
    else:
        _hidden_of_routed(
            x, experts, weights, gate_up_proj, scales, hidden, which, pairs, D, F, CHOSEN, PAIRS, COLUMNS, ROWS, DEPTH,
            SCALED, EVERY, CHUNK, ALONE,
        )  # fmt: skip


@triton.jit
def _hidden_of_shared(
    x, shared, hidden, mine, pairs, tokens, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Part `mine` of the shared MLP, for every token."""
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate_at = shared + (mine * F + f).to(tl.int64)[:, None] * D
    for first in range(0, tokens, COLUMNS):
        token = first + tl.arange(0, COLUMNS)
        live = token < tokens
        gate, up = _gate_and_up(
            x, token, live, gate_at, None, None, f < F, D, SHARED * F * D, COLUMNS, ROWS, DEPTH, False
        )
        active = gate / (1.0 + tl.exp(-gate)) * up
        at = hidden + (pairs + mine * tokens + token)[None, :] * F + f[:, None]
        tl.store(at, active.to(hidden.dtype.element_ty), mask=(f < F)[:, None] & live[None, :])


@triton.jit
def _hidden_of_routed(
    x, experts, weights, gate_up_proj, scales, hidden, which, pairs, D: tl.constexpr, F: tl.constexpr,
    CHOSEN: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    SCALED: tl.constexpr, EVERY: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = (D + 127) // 128  # blocks across
    TALL: tl.constexpr = (F + 127) // 128
    f = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, works = _expert_of(experts, which, PAIRS, ALONE, EVERY)
    gate_at = gate_up_proj + expert * 2 * F * D + f[:, None] * D
    gate_scale = scales
    up_scale = scales
    if SCALED:
        gate_scale += (expert * 2 * TALL + tl.program_id(0) * ROWS // 128) * WIDE
        up_scale = gate_scale + TALL * WIDE
    skipped = which * 0
    pair, live, count = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)
    count = tl.where(works, count, 0)
    while skipped < count:
        gate, up = _gate_and_up(
            x, pair // CHOSEN, live, gate_at, gate_scale, up_scale, f < F, D, F * D, COLUMNS, ROWS, DEPTH, SCALED
        )
        factor = tl.load(weights + pair, mask=live, other=0.0)
        active = gate / (1.0 + tl.exp(-gate)) * up * factor[None, :]
        at = hidden + pair[None, :] * F + f[:, None]
        tl.store(at, active.to(hidden.dtype.element_ty), mask=(f < F)[:, None] & live[None, :])
        skipped += COLUMNS
        if skipped < count:
            pair, live, _ = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)


@triton.jit
def _gate_and_up(
    x, token, live, gate_at, gate_scale, up_scale, inside, D: tl.constexpr, UP: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Products float32 [ROWS, COLUMNS] of the gate's rows at `gate_at` and those UP numbers behind them with tokens."""
    depth = tl.arange(0, DEPTH)
    x_at = x + token[:, None] * D + depth[None, :]
    gate_at += depth[None, :]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, D, DEPTH):
        rows = tl.trans(tl.load(x_at + k, mask=live[:, None] & (k + depth < D)[None, :], other=0.0))
        there = inside[:, None] & (k + depth < D)[None, :]
        gate_tile = tl.load(gate_at + k, mask=there, other=0.0)
        up_tile = tl.load(gate_at + UP + k, mask=there, other=0.0)
        if SCALED:
            gate += tl.dot(gate_tile.to(rows.dtype), rows) * tl.load(gate_scale + k // 128)
            up += tl.dot(up_tile.to(rows.dtype), rows) * tl.load(up_scale + k // 128)
        else:
            gate = tl.dot(gate_tile, rows, gate)
            up = tl.dot(up_tile, rows, up)
    return gate, up


@triton.jit(do_not_specialize=["pairs", "tokens"])
def _outputs(
    hidden, experts, down_proj, scales, shared, out, pairs, tokens, D: tl.constexpr, F: tl.constexpr,
    CHOSEN: tl.constexpr, SHARED: tl.constexpr, PAIRS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, SCALED: tl.constexpr, EVERY: tl.constexpr, CHUNK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1) - SHARED
    if SHARED > 0:
        if which < 0:
            _outputs_of_shared(hidden, shared, out, which + SHARED, pairs, tokens, D, F, SHARED, COLUMNS, ROWS, DEPTH)
        else:
            _outputs_of_routed(
                hidden, experts, down_proj, scales, out, which, pairs, D, F, PAIRS, COLUMNS, ROWS, DEPTH, SCALED, EVERY,
                CHUNK, ALONE,
            )  # fmt: skip
    else:
        _outputs_of_routed(
            hidden, experts, down_proj, scales, out, which, pairs, D, F, PAIRS, COLUMNS, ROWS, DEPTH, SCALED, EVERY,
            CHUNK, ALONE,
        )  # fmt: skip


@triton.jit
def _outputs_of_shared(
    hidden, shared, out, mine, pairs, tokens, D: tl.constexpr, F: tl.constexpr, SHARED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weight_at = shared + d.to(tl.int64)[:, None] * (SHARED * F) + mine * F
    for first in range(0, tokens, COLUMNS):
        token = first + tl.arange(0, COLUMNS)
        live = token < tokens
        row = pairs + mine * tokens + token
        result = _down(hidden, row, live, weight_at, None, d < D, F, COLUMNS, ROWS, DEPTH, False)
        tl.store(out + row[None, :] * D + d[:, None], result, mask=(d < D)[:, None] & live[None, :])


@triton.jit
def _outputs_of_routed(
    hidden, experts, down_proj, scales, out, which, pairs, D: tl.constexpr, F: tl.constexpr, PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr, EVERY: tl.constexpr,
    CHUNK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = (F + 127) // 128
    TALL: tl.constexpr = (D + 127) // 128
    d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, works = _expert_of(experts, which, PAIRS, ALONE, EVERY)
    weight_at = down_proj + expert * D * F + d[:, None] * F
    if SCALED:
        scales += (expert * TALL + tl.program_id(0) * ROWS // 128) * WIDE
    skipped = which * 0
    pair, live, count = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)
    count = tl.where(works, count, 0)
    while skipped < count:
        result = _down(hidden, pair, live, weight_at, scales, d < D, F, COLUMNS, ROWS, DEPTH, SCALED)
        tl.store(out + pair[None, :] * D + d[:, None], result, mask=(d < D)[:, None] & live[None, :])
        skipped += COLUMNS
        if skipped < count:
            pair, live, _ = _pick(experts, expert, which, skipped, pairs, COLUMNS, CHUNK, ALONE)


@triton.jit
def _down(
    hidden, row, live, weight_at, scales, inside, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Products float32 [ROWS, COLUMNS] of the weights' rows at `weight_at` with hidden rows."""
    depth = tl.arange(0, DEPTH)
    hidden_at = hidden + row[:, None] * F + depth[None, :]
    weight_at += depth[None, :]
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, F, DEPTH):
        rows = tl.trans(tl.load(hidden_at + k, mask=live[:, None] & (k + depth < F)[None, :], other=0.0))
        tile = tl.load(weight_at + k, mask=inside[:, None] & (k + depth < F)[None, :], other=0.0)
        if SCALED:
            result += tl.dot(tile.to(rows.dtype), rows) * tl.load(scales + k // 128)
        else:
            result = tl.dot(tile, rows, result)
    return result


@triton.jit(do_not_specialize=["tokens"])
def _sum(
    rows, out, tokens, D: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        total += tl.load(rows + (token * CHOSEN + choice) * D + d, mask=d < D, other=0.0)
    for mine in tl.static_range(SHARED):
        total += tl.load(rows + (tokens * (CHOSEN + mine) + token) * D + d, mask=d < D, other=0.0)
    tl.store(out + token * D + d, total.to(out.dtype.element_ty), mask=d < D)
