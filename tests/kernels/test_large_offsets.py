"""Tensors of which an element lies 2^31 elements and more from the first: the same results, bit for bit, as others.

The memory between the few elements in use is asked for and never touched, so that it costs nothing. An offset that
wraps around lands in the half before them, in zeros.
"""

import pytest
import torch
from torch import Tensor

from tests.kernels.test_latent_heads import rotations
from tests.kernels.test_rms_norm import noise

pytest.importorskip("triton", reason="triton comes with CUDA builds of torch")
HALF = 1 << 31


@pytest.fixture(autouse=True)
def nothing_is_copied_back(monkeypatch):
    """The interpreter (3.6) copies all of each argument's storage onto itself: here, gigabytes that were never used."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)


@pytest.fixture
def far(device):
    """Moves a tensor: dimension `dimension` gets the largest stride, its last element 2^31 and more from its first."""
    storage = torch.empty(2 * HALF + (1 << 16), dtype=torch.bfloat16, device=device)

    def move(x: Tensor, dimension: int) -> Tensor:
        strides = list(x.movedim(dimension, 0).contiguous().movedim(0, dimension).stride())
        strides[dimension] = -(-HALF // (x.shape[dimension] - 1)) + 64
        moved = storage.as_strided(x.shape, strides, HALF)
        # An int32 offset to the last index would be 2^32 less.
        moved.select(dimension, -1).as_strided(
            moved.select(dimension, -1).shape,
            moved.select(dimension, -1).stride(),
            HALF + strides[dimension] * (x.shape[dimension] - 1) - 2 * HALF,
        ).zero_()
        return moved.copy_(x)

    return move


def test_heads_far_apart_are_made_and_turned(far, device):
    from benthic.kernels.latent_heads import latent_heads

    query, expanded = (noise(1, 2, 3, 12, device=device, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    rotary_key, table = noise(1, 2, 4, device=device, dtype=torch.bfloat16, seed=2), rotations(2, 2, device)
    expected = latent_heads(query, expanded, rotary_key, table, True)
    for found in (
        latent_heads(far(query, 2), expanded, rotary_key, table, True),
        latent_heads(query, far(expanded, 2), rotary_key, table, True),
        latent_heads(query, expanded, far(rotary_key, 1), table, True),
    ):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_gradients_of_heads_far_apart_are_read(moved, far, device):
    """As attention's backward pass leaves them: [B, H, S, D] in memory, of 128 heads and 131,072 positions."""
    from benthic.kernels.latent_heads import latent_heads_backward

    gradients = [noise(1, 2, 3, width, device=device, dtype=torch.bfloat16, seed=width) for width in (12, 12, 6)]
    table = rotations(2, 2, device)
    expected = latent_heads_backward(*gradients, table, True)
    gradients[moved] = far(gradients[moved], 2)
    found = latent_heads_backward(*gradients, table, True)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dimension", [1, 2])
def test_rotary_reads_far(dimension, far, device):
    from benthic.kernels.rotary import rotary

    x, table = noise(1, 3, 3, 8, device=device, dtype=torch.bfloat16), rotations(3, 4, device)
    assert torch.equal(rotary(far(x, dimension), table, True), rotary(x, table, True))


def test_norms_read_rows_far_apart(far, device):
    from benthic.kernels.rms_norm import add_rms_norm, rms_norm_backward

    x, residual = (noise(3, 40, device=device, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = noise(40, device=device, dtype=torch.bfloat16, seed=2)
    total, normed, inverse = add_rms_norm(residual, x, weight, 1e-3)
    for found in (add_rms_norm(far(residual, 0), x, weight, 1e-3), add_rms_norm(residual, far(x, 0), weight, 1e-3)):
        assert all(torch.equal(*pair) for pair in zip(found, (total, normed, inverse), strict=True))
    expected = rms_norm_backward(normed, total, weight, inverse)
    for found in (
        rms_norm_backward(far(normed, 0), total, weight, inverse),
        rms_norm_backward(normed, far(total, 0), weight, inverse),
    ):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_swiglu_reads_rows_far_apart(far, device):
    from benthic.kernels.swiglu import swiglu, swiglu_backward

    gate, up, grad = (noise(3, 40, device=device, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    assert torch.equal(swiglu(far(gate, 0), up), swiglu(gate, up))
    expected = swiglu_backward(grad, gate, up)
    for found in (swiglu_backward(far(grad, 0), gate, up), swiglu_backward(grad, gate, far(up, 0))):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter knows no largest grid, and is slow")
def test_rows_of_131072_tokens_and_8_choices_are_quantised():
    """A launch has at most 65,535 blocks in its second dimension: of 16 rows, fewer than these."""
    from benthic.kernels.quantise import quantise_rows
    from benthic.kernels.swiglu_fp8 import swiglu_gradient_quantised, swiglu_quantised

    rows = 131_072 * 8 + 1
    x = torch.randn(rows, 32, device="cuda", dtype=torch.bfloat16)
    last = slice(-16, None)
    values, scales = quantise_rows(x, True)
    few = quantise_rows(x[last].clone(), True)
    assert torch.equal(values[last].view(torch.uint8), few[0].view(torch.uint8))
    assert torch.equal(scales[:, last], few[1])
    found, expected = swiglu_quantised(x, None), swiglu_quantised(x[last].clone(), None)
    assert torch.equal(found[0][last].view(torch.uint8), expected[0].view(torch.uint8))
    back = swiglu_gradient_quantised(x[:, :16].contiguous(), found[2], found[3], None)
    few = swiglu_gradient_quantised(x[last, :16].contiguous(), expected[2], expected[3], None)
    assert torch.equal(back[0][last].view(torch.uint8), few[0].view(torch.uint8))


def test_the_last_of_many_logits_has_its_gradient(device):
    """16,640 rows of 129,280: more than 2^31 logits; the last rows, at the same place in memory, alone."""
    if device == "cpu":
        pytest.skip("rows before the last would be computed one by one")
    from benthic.kernels.cross_entropy import cross_entropy_

    rows, columns = 16_640, 129_280
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    logits[-2:] = noise(2, columns, device=device, dtype=torch.bfloat16)
    targets = torch.arange(rows, device=device)
    few = logits[-2:].clone()
    losses, expected = cross_entropy_(logits, targets, 0.5), cross_entropy_(few, targets[-2:], 0.5)
    assert torch.equal(losses[-2:], expected)
    assert torch.equal(logits[-2:], few)
