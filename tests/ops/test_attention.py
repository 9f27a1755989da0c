"""Fused attention on a GPU, with MLA's widths and the strides the model gives, against attention in float32."""

from __future__ import annotations

import pytest
import torch

from benthic import ops
from benthic.numerics.reference import attention as reference
from tests.ops.test_ops import noise

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="compares torch's GPU kernels")


def model_inputs(batch: int, positions: int, heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries and keys of 192 channels, and values that are the last 128 of 256."""
    wide = [noise(batch, positions, heads, width, seed=width) for width in (192, 193, 256)]
    query, key, expanded = (x.to("cuda", dtype) for x in (wide[0], wide[1][..., :192], wide[2]))
    return [query.requires_grad_(), key.contiguous().requires_grad_(), expanded.requires_grad_()]


@pytest.mark.parametrize("documents", [None, [[0] * 100 + [1] * 61 + [2] * 39, [5] * 200]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latent_widths_with_and_without_documents(documents, dtype):
    leaves = model_inputs(2, 200, 4, dtype)
    documents = None if documents is None else torch.tensor(documents, device="cuda")
    mask = None if documents is None else ops.document_mask(documents)
    direction = noise(2, 200, 4, 128, seed=9).to("cuda", dtype)
    query, key, expanded = leaves
    out = ops.attention(query, key, expanded[..., 128:], 192**-0.5, mask)
    grads = torch.autograd.grad(out, leaves, direction)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    visible = reference.visible(200, None if documents is None else documents.cpu()).cuda()
    expected = reference.attention(exact[0], exact[1], exact[2][..., 128:], 192**-0.5, visible)
    for ours, theirs in zip(
        (out, *grads), (expected, *torch.autograd.grad(expected, exact, direction.double())), strict=True
    ):
        # Long sums of rounded products: single elements near zero say nothing.
        assert (ours - theirs).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * theirs.norm()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper's order of kernels"
)
def test_hopper_runs_cudnn_and_leaves_everything_where_it_is():
    query, key, expanded = model_inputs(1, 256, 4, torch.bfloat16)
    value = expanded[..., 128:]
    # All events: torch 2.11 warns of those of earlier cycles that it drops, even where there are none.
    with torch.profiler.profile(acc_events=True) as profile:
        out = ops.attention(query, key, value, 192**-0.5)
        grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_cudnn_attention" in names
    assert not names & {"aten::contiguous", "aten::clone", "aten::constant_pad_nd"}
    assert out.is_contiguous()
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_behind_keys_of_others_see_all_keys_up_to_their_own(dtype):
    query, key, expanded = model_inputs(2, 200, 4, dtype)
    late = query[:, 136:]
    direction = noise(2, 64, 4, 128, seed=9).to("cuda", dtype)
    found = ops.attention(late, key, expanded[..., 128:], 192**-0.5)
    expected = ops.attention(query, key, expanded[..., 128:], 192**-0.5)[:, 136:]
    leaves = [query, key, expanded]
    both = [(one, *torch.autograd.grad(one, leaves, direction)) for one in (found, expected)]
    for ours, theirs in zip(*both, strict=True):
        assert (ours - theirs).norm() <= (1e-4 if dtype == torch.float32 else 1e-2) * theirs.norm()


def test_late_queries_run_flash_and_not_the_slower_kernel():
    query, key, expanded = model_inputs(1, 256, 4, torch.bfloat16)
    with torch.profiler.profile(acc_events=True) as profile:
        out = ops.attention(query[:, 128:], key, expanded[..., 128:], 192**-0.5)
        torch.autograd.grad(out, (query, key, expanded), torch.ones_like(out))
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in names
    assert "aten::_scaled_dot_product_flash_attention_backward" in names
