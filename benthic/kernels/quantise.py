"""FP8 (e4m3) quantisation in the three shapes that DeepSeek-V3's matmuls need (arXiv:2412.19437 section 3.3.2).

    quantise_rows       1 x 128 along a row      activations and gradients that are contracted over their columns
    quantise_columns    128 x 1 down a group     the same tensors, transposed, contracted over tokens (weight gradients)
    quantise_weights    128 x 128                expert weights; with_transpose adds the input gradient's copy

Every block stores values and one fp32 scale, `scale = max(amax * (1 / 448), 2^-126)`, 1 for a block of zeros, and
`value = x * (1 / scale)`; `power_of_two` rounds scales up to powers of two. Memory sets the pace: 3 bytes an element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

BLOCK = 128


def quantise_rows(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, C] -> (values float8_e4m3fn [T, C], scales float32 [ceil(C / 128), T]), a scale for 128 columns of a row.

    Scales lie block-major (tokens contiguous): 128 tokens of one block are one burst for the matmul that reads them.
    """
    rows, columns = _matrix(x)
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scales = x.new_empty((triton.cdiv(columns, BLOCK), rows), dtype=torch.float32)
    if x.numel():
        grid = (triton.cdiv(columns, BLOCK) * triton.cdiv(rows, 16),)  # other dimensions end at 65,535
        _rows[grid](x, values, scales, rows, columns, power_of_two, ROWS=16, num_warps=4)
    return values, scales


def quantise_columns(x: Tensor, ends: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, C] in groups of rows -> (values float8_e4m3fn [C, P], scales float32 [P / 128, C]), transposed by group.

    `ends` int32 [E] on the device: group e is the rows from ends[e - 1] (0 for the first) to ends[e]; empty groups are
    allowed. Every group starts a fresh block of 128 tokens, at block `start // 128 + e`, so that the host needs no look
    at `ends` to know P = (T // 128 + E) * 128; the last block of a group is filled up with zeros. Blocks between groups
    hold nothing and are never read. C must be a multiple of 16.

    A program has 128 tokens and twice 64 columns, all of which it asks for before it works on the first.
    """
    rows, columns = _matrix(x)
    if columns % 16:
        raise ValueError(f"x has {columns} columns; a transposed fp8 copy needs a multiple of 16 (16-byte rows)")
    blocks = rows // BLOCK + len(ends)
    values = x.new_empty((columns, blocks * BLOCK), dtype=torch.float8_e4m3fn)
    scales = x.new_empty((blocks, columns), dtype=torch.float32)
    if x.numel():
        grid = (triton.cdiv(columns, 128), blocks)
        _columns[grid](
            x, ends, values.view(torch.int32), scales, columns, blocks * BLOCK // 4, len(ends), power_of_two,
            GROUPS=triton.next_power_of_2(len(ends)), WIDTH=64, TILES=2, num_warps=4,
        )  # fmt: skip
    return values, scales


def quantise_weights(weight: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """weight [E, R, C] -> (values float8_e4m3fn [E, R, C], scales float32 [E, ceil(R / 128), ceil(C / 128)])."""
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = weight.new_empty(_blocks_of(weight), dtype=torch.float32)
    _quantise_weights(weight, values, scales, None, None, power_of_two)
    return values, scales


def quantise_weights_with_transpose(
    weight: Tensor, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [E, R, C] -> (values, scales) of quantise_weights, then the same transposed, [E, C, R] and its scales.

    One read serves both: 4 bytes an element instead of 6.
    """
    experts, rows, columns = weight.shape
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = weight.new_empty(_blocks_of(weight), dtype=torch.float32)
    transposed = values.new_empty((experts, columns, rows))
    transposed_scales = scales.new_empty((experts, scales.shape[2], scales.shape[1]))
    _quantise_weights(weight, values, scales, transposed, transposed_scales, power_of_two)
    return values, scales, transposed, transposed_scales


def _quantise_weights(weight, values, scales, transposed, transposed_scales, power_of_two: bool) -> None:
    if not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous, not of strides {weight.stride()}")
    if weight.numel():
        experts, rows, columns = weight.shape
        grid = (scales.shape[2], scales.shape[1], experts)
        _weights[grid](
            weight, values, scales, transposed, transposed_scales, rows, columns, power_of_two,
            TRANSPOSE=transposed is not None, num_warps=4,
        )  # fmt: skip


def _blocks_of(weight: Tensor) -> tuple[int, int, int]:
    experts, rows, columns = weight.shape
    return experts, triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK)


def _matrix(x: Tensor) -> tuple[int, int]:
    if x.ndim != 2 or not x.is_contiguous():
        raise ValueError(f"x must be a contiguous matrix, not of shape {list(x.shape)} and strides {x.stride()}")
    return x.shape[0], x.shape[1]


@triton.jit
def _scale(amax, POWER_OF_TWO: tl.constexpr):
    scale = tl.maximum(amax * (1.0 / 448.0), 1.1754943508222875e-38)
    if POWER_OF_TWO:  # rounding the mantissa up carries into the exponent: exact, no logarithm
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def _rows(x, values, scales, T, C, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr):
    across = tl.cdiv(C, 128)
    block = tl.program_id(0) % across
    t = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = block * 128 + tl.arange(0, 128)
    inside = (t < T)[:, None] & (c < C)[None, :]
    at = t[:, None] * C + c[None, :]
    loaded = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, 128]
    scale = _scale(tl.max(tl.abs(loaded), 1), POWER_OF_TWO)
    tl.store(values + at, (loaded * (1.0 / scale)[:, None]).to(tl.float8e4nv), mask=inside)
    tl.store(scales + block.to(tl.int64) * T + t, scale, mask=t < T)


@triton.jit
def _weights(
    weight, values, scales, transposed, transposed_scales, R, C, POWER_OF_TWO: tl.constexpr, TRANSPOSE: tl.constexpr
):
    expert = tl.program_id(2).to(tl.int64)
    r = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    c = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (r < R)[:, None] & (c < C)[None, :]
    at = expert * R * C + r[:, None] * C + c[None, :]
    loaded = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)  # [128, 128]
    scale = _scale(tl.max(tl.max(tl.abs(loaded), 1), 0), POWER_OF_TWO)
    quantised = (loaded * (1.0 / scale)).to(tl.float8e4nv)
    tl.store(values + at, quantised, mask=inside)
    tl.store(scales + (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0), scale)
    if TRANSPOSE:
        across = expert * R * C + c[:, None] * R + r[None, :]
        tl.store(transposed + across, tl.trans(quantised), mask=(c < C)[:, None] & (r < R)[None, :])
        across = (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(transposed_scales + across, scale)


@gluon.jit(do_not_specialize=["E"])
def _columns(
    x, ends, values, scales, C, WORDS, E,
    POWER_OF_TWO: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    block = gl.program_id(1)
    first, end = rows_of_block(ends, block, E, GROUPS)
    if first < end:
        COPY: gl.constexpr = copy_layout(WIDTH, x.dtype.element_ty.primitive_bitwidth // 8, gl.num_warps())
        t = first + quads(gl.SliceLayout(1, COPY))
        column = gl.program_id(0) * (WIDTH * TILES)
        c = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPY))
        ring = fetch_tiles(x + t[:, None].to(gl.int64) * C + c[None, :], t < end, c, C, TILES)
        for tile in range(TILES):
            async_copy.wait_group(TILES - 1)
            mine = ring.index(tile)
            store_columns(
                rows_of_quads(mine, 0), rows_of_quads(mine, 1), rows_of_quads(mine, 2), rows_of_quads(mine, 3),
                values, scales, block, column + tile * WIDTH, C, WORDS, POWER_OF_TWO,
            )  # fmt: skip
            async_copy.commit_group()  # an empty one: each turn waits for all but TILES - 1


@gluon.jit
def quads(layout: gl.constexpr):
    """0, 4, 8 ... 124, then 1, 5 ...: the order in which a block's 128 tokens lie in shared memory."""
    i = gl.arange(0, 128, layout=layout)
    return i % 32 * 4 + i // 32


@gluon.jit
def fetch_tiles(pointers, valid, c, C, TILES: gl.constexpr):
    """A ring [TILES, 128, W] in shared memory into which all TILES tiles of W columns are on their way, a group of
    copies each. `pointers` [128, W] are those of the first; rows that are not `valid` and columns past C are zeros."""
    WIDTH: gl.constexpr = pointers.shape[1]
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    ring = gl.allocate_shared_memory(pointers.dtype.element_ty, [TILES, 128, WIDTH], PLAIN)
    for tile in gl.static_range(TILES):
        inside = valid[:, None] & (c + tile * WIDTH < C)[None, :]
        async_copy.async_copy_global_to_shared(ring.index(tile), pointers + tile * WIDTH, inside)
        async_copy.commit_group()
    return ring


@gluon.jit
def rows_of_quads(tile, j: gl.constexpr):
    """Tokens j, 4 + j, 8 + j ... of a fetched tile, float32 [32, W] of quad_layout."""
    LOAD: gl.constexpr = quad_layout(tile.shape[1], gl.num_warps())
    return tile.slice(32 * j, 32).load(LOAD).to(gl.float32)


@gluon.constexpr_function
def copy_layout(width: int, size: int, warps: int) -> gl.BlockedLayout:
    """16 bytes a thread of [128, width] elements of `size` bytes: what one asynchronous copy moves."""
    across = width * size // 16
    return gl.BlockedLayout([1, 16 // size], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def quad_layout(width: int, warps: int) -> gl.BlockedLayout:
    """Of tokens j, 4 + j, 8 + j ... of 128, [32, width]: of four such tensors a thread has four tokens in a row of a
    column, which make one word. 8 columns a thread, and as many rows as there are left."""
    across = width // 8
    return gl.BlockedLayout([max(across // warps, 1), 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.jit
def rows_of_block(ends, block, E, GROUPS: gl.constexpr):
    """(first, end): rows first to first + 127 are block `block` of a transposed copy, as far as they lie before `end`;
    none do where the block lies between groups. GROUPS is E rounded up to a power of two."""
    group = gl.arange(0, GROUPS, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    starts = gl.load(ends + group - 1, mask=(group > 0) & (group < E), other=0)
    mine = gl.sum(((starts // 128 + group <= block) & (group < E)).to(gl.int32), 0) - 1  # the last to start by here
    start = gl.load(ends + mine - 1, mask=mine > 0, other=0)
    end = gl.load(ends + mine)
    return start + (block - (start // 128 + mine)) * 128, end


@gluon.jit
def store_columns(x0, x1, x2, x3, values, scales, block, column, C, WORDS, POWER_OF_TWO: gl.constexpr):
    """Quantises 128 tokens x W columns from `column` on, float32 of quad_layout (x1[q] is token 4 q + 1), and writes
    them to block `block` of values int32 [C, WORDS] (four tokens a word) and of scales [WORDS / 32, C]."""
    WIDTH: gl.constexpr = x0.shape[1]
    STORE: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, gl.num_warps()], [0, 1])
    amax = gl.maximum(gl.maximum(gl.abs(x0), gl.abs(x1)), gl.maximum(gl.abs(x2), gl.abs(x3)))
    amax = gl.max(amax, 0)
    scale = gl.maximum(amax * (1.0 / 448.0), 1.1754943508222875e-38)
    if POWER_OF_TWO:
        exponent = (scale.to(gl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = gl.where(amax == 0, 1.0, exponent.to(gl.float32, bitcast=True))
        # Without a division: 2^-n for 2^n, and 0 for the infinity that 2^128 has become.
        inverse = gl.maximum(0x7F000000 - scale.to(gl.int32, bitcast=True), 0).to(gl.float32, bitcast=True)
    else:
        scale = gl.where(amax == 0, 1.0, scale)
        inverse = 1.0 / scale
    c = column + gl.arange(0, WIDTH, layout=amax.type.layout)
    gl.store(scales + block * C + c, scale, mask=c < C)
    inverse = inverse[None, :]
    words = gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;"
        " cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; mov.b32 $0, {low, high}; }",
        "=r,f,f,f,f", [x0 * inverse, x1 * inverse, x2 * inverse, x3 * inverse],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    words = gl.convert_layout(words, STORE)  # [32, WIDTH], through shared memory
    word = block * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, STORE))
    c = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, STORE))
    gl.store(values + c[None, :].to(gl.int64) * WORDS + word[:, None], words, mask=(c < C)[None, :])
