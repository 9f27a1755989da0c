"""The in-place cross entropy equals torch's on whole logits: losses, gradients, ignored rows, odd widths."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from benthic.numerics.compare import assert_close

pytest.importorskip("triton", reason="comes with CUDA builds of torch")
kernels = import_module("benthic.kernels.cross_entropy")
head = import_module("benthic.ops.linear_cross_entropy")
IGNORED = -100


def rows(count, columns, dtype=torch.float32, device="cpu", seed=0):
    stream = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(count, columns, generator=stream)).to(dtype)
    targets = torch.randint(0, columns, (count,), generator=stream)
    targets[1::3] = IGNORED
    return logits.to(device), targets.to(device)


@pytest.mark.parametrize(("count", "columns"), [(7, 91), (3, 1), (4, 512), (2, 20_001), (3, 40_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned")
def test_losses_and_gradients_equal_those_of_torch(count, columns, dtype, device):
    logits, targets = rows(count, columns, dtype, device)
    whole = logits.float().requires_grad_()
    expected = F.cross_entropy(whole, targets, reduction="none", ignore_index=IGNORED)
    (expected_gradient,) = torch.autograd.grad(expected.sum() / 37, whole)
    found = kernels.cross_entropy_(logits, targets, 1 / 37)
    assert_close(found, expected, "operation_fp32")
    kind = "operation_fp32" if dtype == torch.float32 else "operation_bf16"
    assert_close(logits * 37, expected_gradient * 37, kind)
    assert not logits[targets == IGNORED].any()


def test_a_row_may_have_several_blocks(monkeypatch, device):
    monkeypatch.setattr(kernels, "BLOCK", 128)
    logits, targets = rows(3, 700, device=device)
    expected = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    found = kernels.cross_entropy_(logits, targets, 1.0)
    assert_close(found, expected, "operation_fp32")


def test_without_gradient_the_logits_stay(device):
    logits, targets = rows(5, 300, device=device)
    before = logits.clone()
    with_it = kernels.cross_entropy_(before.clone(), targets, 1.0)
    assert torch.equal(kernels.cross_entropy_(logits, targets, 1.0, with_gradient=False), with_it)
    assert torch.equal(logits, before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_seen_in_the_loss_unless_its_row_is_ignored(value, device):
    logits, targets = rows(3, 100, device=device)
    logits[:2, 7] = value
    found = kernels.cross_entropy_(logits, targets, 1.0)
    assert not found[0].isfinite()
    assert found[1] == 0
    assert not logits[1].any()
    assert found[2].isfinite()


def test_nothing_to_judge_is_fine(device):
    found = kernels.cross_entropy_(
        torch.zeros(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device), 1.0
    )
    assert found.shape == (0,)


def test_strided_logits_are_refused(device):
    with pytest.raises(ValueError, match="logits must be contiguous"):
        kernels.cross_entropy_(torch.zeros(4, 6, device=device).t(), torch.zeros(6, dtype=torch.int64), 1.0)


# Triton's interpreter cuts bfloat16 off instead of rounding it; float16 it rounds as a GPU does.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_multiplying_in_place_rounds_once_and_leaves_alone_at_one(dtype, device):
    x = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for factor in (1.0, 0.3, 0.0):
        found = x.clone()
        kernels.multiply_(found, torch.tensor(factor, device=device))
        assert torch.equal(found, (x.float() * torch.tensor(factor, device=device)).to(dtype))


@pytest.fixture(params=[1 << 31, 300])
def _gpu_path(request, monkeypatch):
    """What a GPU runs, on any device: all rows at once, and three at a time."""
    monkeypatch.setitem(head._BLOCK_ELEMENTS, "cuda", request.param)


@pytest.mark.usefixtures("_gpu_path")
@pytest.mark.parametrize("weighted", [1.0, 0.3])
def test_the_head_on_a_gpu_equals_torch(weighted, device):
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 12, generator=stream).to(device).requires_grad_()
    weight = torch.randn(91, 12, generator=stream).to(device).requires_grad_()
    targets = torch.randint(0, 91, (17,), generator=stream).to(device)
    targets[3] = IGNORED
    loss = head._InPlace.apply(hidden, weight, targets, 5)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 5
    assert_close(loss, expected, "operation_fp32")
    ours = torch.autograd.grad(loss * weighted, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(expected * weighted, (hidden, weight)), strict=True):
        assert_close(a, b, "gradient_fp32")
    (alone,) = torch.autograd.grad(head._InPlace.apply(hidden, weight.detach(), targets, 5) * weighted, hidden)
    assert torch.equal(alone, ours[0])
    with torch.no_grad():
        assert torch.equal(head._InPlace.apply(hidden, weight, targets, 5), loss)


def test_a_second_backward_is_refused(device):
    hidden, targets = rows(5, 12, device=device)
    hidden.requires_grad_()
    loss = head._InPlace.apply(hidden, torch.ones(91, 12, device=device), targets, 1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used already"):
        loss.backward()


def test_the_weights_gradient_is_adopted_and_not_copied(device):
    """The tensor the product wrote becomes the weight's gradient: no second array as large as the weight."""
    hidden, targets = rows(5, 12, device=device)
    weight = torch.ones(91, 12, device=device).requires_grad_()
    loss = head._InPlace.apply(hidden, weight, targets, 1.0)
    written = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == written


@pytest.mark.skipif(not torch.cuda.is_available(), reason="products of bfloat16 into float32 are a GPU's")
@pytest.mark.parametrize("block", [1 << 31, 64 * 200])
def test_a_bfloat16_head_in_blocks_adds_up_in_float32(block, monkeypatch):
    monkeypatch.setitem(head._BLOCK_ELEMENTS, "cuda", block)
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=stream).cuda().bfloat16().requires_grad_()
    weight = (torch.randn(200, 64, generator=stream) / 8).cuda().bfloat16().requires_grad_()
    targets = torch.randint(0, 200, (300,), generator=stream).cuda()
    loss, _ = head.linear_cross_entropy(hidden, weight, targets, 300)
    expected = F.cross_entropy(hidden.float() @ weight.float().T, targets)
    assert_close(loss, expected, "operation_bf16")
    ours = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()
