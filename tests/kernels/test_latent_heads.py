"""Turned queries, assembled keys and every gradient equal the reference's in float64, on odd sizes and views."""

import pytest
import torch

from benthic import ops
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import latent_heads as reference
from benthic.numerics.reference import rotary as reference_rotary
from benthic.ops.latent_heads import _KernelLatentHeads
from benthic.ops.rotary import _KernelRotary
from tests.kernels.test_rms_norm import compare, noise

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
# B, S, H, N, R, V
SHAPES = [
    (1, 1, 1, 1, 2, 1),
    (2, 3, 3, 5, 6, 7),
    (1, 4, 16, 128, 64, 128),
    (2, 2, 40, 24, 8, 16),
    (1, 2, 128, 128, 64, 128),
]
DTYPES = [torch.float32, torch.bfloat16]


def rotations(positions: int, pairs: int, device: str) -> torch.Tensor:
    angles = torch.randn(positions, pairs, generator=torch.Generator().manual_seed(9)) * 3
    return torch.polar(torch.full_like(angles, 1.2), angles).to(device)


def inputs(shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the model gives: heads, and a rotary key that is a slice of wider rows."""
    batch, positions, heads, own, rotary, value = shape
    return [
        noise(batch, positions, heads, own + rotary, device=device, dtype=dtype),
        noise(batch, positions, heads, own + value, device=device, dtype=dtype, seed=1),
        noise(batch, positions, 12 + rotary, device=device, dtype=dtype, seed=2),
    ]


def apply(query, expanded, wide, table, interleaved):
    return _KernelLatentHeads.apply(query, expanded, wide[..., 12:], table, interleaved)


def exact(query, expanded, wide, table, interleaved):
    return reference.latent_heads(query, expanded, wide[..., 12:], table.to(torch.complex128), interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_and_gradients_equal_the_reference(shape, dtype, interleaved, device):
    batch, positions, heads, own, rotary, value = shape
    table = rotations(positions, rotary // 2, device)
    widths = (own + rotary, own + rotary, value)
    directions = [
        noise(batch, positions, heads, width, device=device, dtype=dtype, seed=3 + index)
        for index, width in enumerate(widths)
    ]
    compare(
        lambda q, e, w: apply(q, e, w, table, interleaved),
        lambda q, e, w: exact(q, e, w, table, interleaved),
        inputs(shape, device, dtype),
        directions,
    )


def test_gradients_in_the_order_of_attention_are_read_in_place(device):
    """Attention's backward pass may leave [B, H, S, D] in memory."""
    shape = (2, 3, 4, 8, 4, 6)
    table = rotations(3, 2, device)
    directions = [
        noise(2, 4, 3, width, device=device, dtype=torch.float32, seed=width).transpose(1, 2) for width in (12, 12, 6)
    ]
    compare(
        lambda q, e, w: apply(q, e, w, table, True),
        lambda q, e, w: exact(q, e, w, table, True),
        inputs(shape, device, torch.float32),
        directions,
    )


def test_values_are_a_view_and_unused_results_have_no_gradient(device):
    query, expanded, wide = (x.requires_grad_() for x in inputs((1, 3, 2, 8, 4, 6), device, torch.float32))
    table = rotations(3, 2, device)
    results = apply(query, expanded, wide, table, True)
    assert results[2].data_ptr() == expanded[..., 8:].data_ptr()
    results[1].sum().backward()
    assert not query.grad.any()
    assert not expanded.grad[..., 8:].any()
    assert torch.equal(expanded.grad[..., :8], torch.ones_like(expanded.grad[..., :8]))


def test_nothing_in_nothing_out(device):
    query, expanded, wide = (x[:0] for x in inputs((1, 3, 2, 8, 4, 6), device, torch.float32))
    query.requires_grad_()
    results = apply(query, expanded, wide, rotations(3, 2, device), True)
    assert [list(x.shape) for x in results] == [[0, 3, 2, 12], [0, 3, 2, 12], [0, 3, 2, 6]]
    sum(x.sum() for x in results).backward()
    assert query.grad.shape == query.shape


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 10), (1, 3, 40, 128), (1, 2, 8, 64)])
def test_rotary_equals_the_reference(shape, dtype, interleaved, device):
    table = rotations(shape[1], shape[3] // 2, device)
    exact_table = table.to(torch.complex128)
    compare(
        lambda x: _KernelRotary.apply(x[..., 4:], table, interleaved),
        lambda x: reference_rotary.rotary(x[..., 4:], exact_table.real, exact_table.imag, interleaved),
        [noise(*shape[:3], 4 + shape[3], device=device, dtype=dtype)],
        [noise(*shape, device=device, dtype=dtype, seed=1)],
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the GPU's path with the processor's")
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_gpu_and_the_processor_agree(interleaved):
    query, expanded, wide = inputs((2, 5, 4, 24, 8, 16), "cpu", torch.float32)
    table = rotations(5, 4, "cpu")
    plain = ops.latent_heads(query, expanded, wide[..., 12:], table, interleaved)
    moved = ops.latent_heads(query.cuda(), expanded.cuda(), wide.cuda()[..., 12:], table.cuda(), interleaved)
    for found, wanted in zip(moved, plain, strict=True):
        assert_close(found, wanted, "operation_fp32")
