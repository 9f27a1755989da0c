"""What the two grouped FP8 kernels share on Hopper (sm_90): descriptors, the ring of stages, and the store of a tile.

Both kernels are persistent: one program a multiprocessor, one producer warp that keeps a ring of shared-memory stages
full through the copy engine, and two consumer warpgroups that multiply (wgmma) and promote to fp32 every 128 of K.
"""

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

GLUON_TYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


class Descriptor(TensorDescriptor):
    """A TensorDescriptor without Triton's checks: two thirds of the time that it takes to make one, up to five times a
    call. `require` and `require_fp8` have made them, but for the address, which the driver checks."""

    def __post_init__(self) -> None:
        pass


def descriptor(tensor: Tensor, block: tuple[int, ...]) -> Descriptor:
    """A copy-engine descriptor of `tensor`, moved in boxes of `block` elements."""
    return Descriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), _layout(block, tensor.dtype))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), GLUON_TYPES[dtype])


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a persistent kernel starts on `device`. Raises RuntimeError where there is no wgmma."""
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        raise RuntimeError(f"{properties.name} is sm_{properties.major}{properties.minor}; this kernel needs sm_90")
    return properties.multi_processor_count


def require_fp8(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `tensor` is contiguous float8_e4m3fn of `shape`, its rows a multiple of 16 bytes."""
    if tensor.dtype != torch.float8_e4m3fn or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous float8_e4m3fn {list(shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )
    if shape[-1] % 16:
        raise ValueError(f"{name} has rows of {shape[-1]} bytes; the copy engine needs a multiple of 16")


def require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless `tensor` is contiguous, of `shape` and `dtype`."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}, "
            f"not {tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
        )


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The ring's next stage and the phase its barriers have there. No division: this is on the critical path."""
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def store_rows(accumulator, result_descriptor, result, buffer, row, column, end, N, PENDING: gl.constexpr):
    """Writes a [64, 128] accumulator to `result` [*, N] at (row, column), without touching rows at or past `end`.

    A whole tile goes through the copy engine and drains while the next tile is multiplied; a tile that `end` cuts is
    written with a mask, because the rows below belong to the next group. `PENDING` stores of this warpgroup may still
    be reading other buffers; a tile that the copy engine does not write waits for all of them, so that they can be
    told apart by counting.
    """
    if row + 64 <= end:
        tma.store_wait(PENDING)
    else:
        tma.store_wait(0)
    gl.thread_barrier()
    buffer.store(accumulator.to(result.dtype.element_ty))
    fence_async_shared()
    gl.thread_barrier()
    if row + 64 <= end:
        tma.async_copy_shared_to_global(result_descriptor, [row, column], buffer)
    elif row < end:
        width = N // 8 * 8  # N, of which the compiler now knows that rows are whole 16-byte stores
        WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
        c = column + gl.arange(0, 128, layout=gl.SliceLayout(0, WIDE))
        inside = (r < end)[:, None] & (c < width)[None, :]
        gl.store(result + r.to(gl.int64)[:, None] * width + c[None, :], buffer.load(WIDE), mask=inside)
