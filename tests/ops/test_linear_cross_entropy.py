"""The chunked loss equals torch's on whole logits: values, gradients, ignored targets."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from benthic.numerics.compare import assert_close
from benthic.numerics.reference.loss import cross_entropy
from benthic.ops import linear_cross_entropy as package_function
from benthic.ops.linear_cross_entropy import IGNORED, linear_cross_entropy

assert package_function is linear_cross_entropy


@pytest.fixture(params=[1 << 20, 300, 1])
def _blocks(request, monkeypatch):
    """Everything in one block, in ragged blocks of 3 rows, and a row at a time."""
    # By its dotted name: as an attribute of the package, the function hides the module.
    module = import_module("benthic.ops.linear_cross_entropy")
    monkeypatch.setitem(module._BLOCK_ELEMENTS, "cpu", request.param)


def inputs(seed: int = 0):
    stream = torch.Generator().manual_seed(seed)
    hidden = torch.randn(17, 12, generator=stream).requires_grad_()
    weight = torch.randn(91, 12, generator=stream).requires_grad_()
    targets = torch.randint(0, 91, (17,), generator=stream)
    return hidden, weight, targets


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("ignored", [(), (0, 5, 16), tuple(range(17))])
def test_values_and_gradients_equal_those_of_torch(ignored):
    hidden, weight, targets = inputs()
    targets[list(ignored)] = IGNORED
    loss, counted = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert torch.equal(counted, torch.tensor(17 - len(ignored)))
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert_close(loss, expected, "operation_fp32")
    assert_close(cross_entropy(hidden @ weight.T, targets)[0], expected, "operation_fp32")
    ours = torch.autograd.grad(loss / 3, (hidden, weight))
    theirs = torch.autograd.grad(expected / 3, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "gradient_fp32")


def test_no_value_is_waited_for():
    """Tensors without values cannot be read, so a wait for a GPU would raise here."""
    hidden, weight, targets = (one.detach().to("meta") for one in inputs())
    loss, counted = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (counted.dtype, counted.shape) == (torch.int64, ())
    loss.backward()


@pytest.mark.usefixtures("_blocks")
def test_one_gradient_alone_or_none():
    hidden, weight, targets = inputs()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets)[0], hidden)
    assert torch.equal(alone, both[0])
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets)[0], weight)
    assert torch.equal(alone, both[1])
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs()
    loss, _ = linear_cross_entropy(hidden * 1e3, weight, targets)
    assert_close(loss, F.cross_entropy(hidden * 1e3 @ weight.T, targets, reduction="sum"), "operation_fp32")


def test_bfloat16_sums_in_float32():
    hidden, weight, targets = inputs()
    half_hidden, half_weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    loss, _ = linear_cross_entropy(half_hidden, half_weight, targets)
    expected = F.cross_entropy(half_hidden.float() @ half_weight.float().T, targets, reduction="sum")
    assert_close(loss / 17, expected / 17, "operation_bf16")
    grads = torch.autograd.grad(loss, (half_hidden, half_weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2


@pytest.mark.parametrize("factor", [1 / 3840, 1 / 1000, 0.3 / 51200])
def test_a_factor_on_the_loss_is_not_rounded_to_bfloat16(factor):
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=stream).bfloat16().requires_grad_()
    weight = torch.randn(100, 32, generator=stream).bfloat16().requires_grad_()
    targets = torch.randint(0, 100, (64,), generator=stream)

    def gradients(scale: float) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0] * scale, (hidden, weight))

    for whole, part in zip(gradients(1.0), gradients(factor), strict=True):
        whole, part = whole.double(), part.double()
        ratio = float((whole * part).sum() / (whole * whole).sum())
        # Elements are rounded each for itself, which averages out; a rounded factor does not (1e-3 to 3e-3 here).
        assert ratio / factor == pytest.approx(1.0, abs=3e-4)
