"""Every operation equals its reference, forwards and backwards, on sizes that are no powers of two."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benthic import ops
from benthic.errors import ConfigError
from benthic.numerics.compare import assert_close
from benthic.numerics.reference import attention as reference_attention
from benthic.numerics.reference import experts as reference_experts
from benthic.numerics.reference import norm as reference_norm
from benthic.numerics.reference import rotary as reference_rotary
from benthic.numerics.reference import routing as reference_routing
from tests.model.configs import CONFIGS, EXPERTS, tiny
from tests.numerics.test_routing import BIAS, LOGITS, WORKED


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def compare(operation, reference, inputs: list[Tensor], name: str = "result") -> None:
    """Values and the gradients of every floating input, for a random direction."""
    results = []
    for function in (operation, reference):
        leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
        out = function(*leaves)
        direction = noise(*out.shape, seed=5)
        grads = torch.autograd.grad((out * direction).sum(), [x for x in leaves if x.requires_grad])
        results.append((out, grads))
    assert_close(results[0][0], results[1][0], "operation_fp32", name)
    for index, (ours, theirs) in enumerate(zip(results[0][1], results[1][1], strict=True)):
        assert_close(ours, theirs, "gradient_fp32", f"gradient {index} of {name}")


@pytest.mark.parametrize("shape", [(7,), (3, 13), (2, 5, 33)])
def test_rms_norm(shape):
    weight = 1 + 0.3 * noise(shape[-1])
    compare(
        lambda x, w: ops.rms_norm(x, w, 1e-3), lambda x, w: reference_norm.rms_norm(x, w, 1e-3), [noise(*shape), weight]
    )


def test_rms_norm_of_a_slice_and_of_zeros():
    weight = 1 + 0.3 * noise(6)
    compare(
        lambda x, w: ops.rms_norm(x[..., 3:9], w, 1e-6),
        lambda x, w: reference_norm.rms_norm(x[..., 3:9], w, 1e-6),
        [noise(4, 5, 11), weight],
    )
    assert not ops.rms_norm(torch.zeros(2, 6), weight, 1e-6).any()


def test_swiglu():
    compare(ops.swiglu, reference_experts.swiglu, [noise(5, 7), noise(5, 7, seed=1)])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(interleaved):
    config = tiny(**CONFIGS["v2 with yarn"])
    cos, sin = reference_rotary.rotation(config.rope_parameters, config.rotary_dim, torch.arange(9, 15))
    table = ops.RotaryTable(config).rows(9, 6, torch.device("cpu"))
    compare(
        lambda x: ops.rotary(x[..., 2:], table, interleaved),
        lambda x: reference_rotary.rotary(x[..., 2:], cos, sin, interleaved),
        [noise(2, 6, 3, 2 + config.rotary_dim)],
    )


def test_a_rotary_table_grows_without_changing():
    config = tiny(max_position_embeddings=3000)
    table, device = ops.RotaryTable(config), torch.device("cpu")
    first = table.rows(0, 10, device).clone()
    assert len(table.rows(2990, 10, device)) == 10
    assert torch.equal(table.rows(0, 10, device), first)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3] * 7])])
def test_attention(key_heads, documents):
    mask = None if documents is None else ops.document_mask(documents)
    visible = reference_attention.visible(7, documents)
    compare(
        lambda q, k, v: ops.attention(q, k, v, 0.3, mask),
        lambda q, k, v: reference_attention.attention(q, k, v, 0.3, visible),
        [noise(2, 7, 4, 6), noise(2, 7, key_heads, 6, seed=1), noise(2, 7, key_heads, 5, seed=2)],
    )


@pytest.mark.parametrize("start", [0, 3, 6])
def test_absorbed_attention_of_the_last_positions(start):
    latents, expansion = noise(2, 7, 9 + 4), noise(3, 6 + 5, 9, seed=1)
    query, rotary_query = noise(2, 7, 3, 6, seed=2), noise(2, 7, 3, 4, seed=3)
    visible = reference_attention.visible(7)[:, start:]
    mask = visible if start == 0 else ops.causal_mask(start, 7 - start, torch.device("cpu"))
    compare(
        lambda q, r, c, w: ops.absorbed_attention(q[:, start:], r[:, start:], c, w, 0.3, mask),
        lambda q, r, c, w: reference_attention.absorbed_attention(q[:, start:], r[:, start:], c, w, 0.3, visible),
        [query, rotary_query, latents, expansion],
    )


def test_the_worked_router_example():
    _, experts, weights, _ = ops.route(LOGITS, BIAS, WORKED)
    found = dict(zip(experts[0].tolist(), weights[0].tolist(), strict=True))
    assert found == pytest.approx({4: 0.996141, 7: 0.899669, 6: 0.604190}, abs=1e-6)


def test_negative_biases_do_not_bring_masked_groups_back():
    assert sorted(ops.route(LOGITS, BIAS - 2, WORKED).experts[0].tolist()) == [4, 6, 7]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]),
    st.sampled_from(["sigmoid", "softmax"]),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (4, 4)]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_any_router_equals_the_reference(method, scoring, groups, norm, chosen, seed):
    groups = (1, 1) if method == "greedy" else groups
    changes = {"topk_method": method, "scoring_func": scoring, "n_group": groups[0], "topk_group": groups[1]}
    changes |= {"norm_topk_prob": norm, "num_experts_per_tok": min(chosen, 8 * groups[1] // groups[0])}
    config = tiny(**(EXPERTS | changes | {"routed_scaling_factor": 1.7}))
    logits = noise(9, 8, seed=seed)
    bias = noise(8, seed=seed + 1) if config.has_routing_bias else None
    ours, theirs = ops.route(logits, bias, config), reference_routing.route(logits, bias, config)
    assert torch.equal(ours.experts.sort().values, theirs[1].sort().values)
    assert_close(ours.scores, theirs[0], "operation_fp32")
    dense = [torch.zeros(9, 8).scatter_(1, experts, weights) for _, experts, weights in (ours[:3], theirs)]
    assert_close(*dense, "operation_fp32")


def test_router_gradients_flow_through_the_weights():
    for name in ("v3", "v2 with yarn"):
        config = tiny(**CONFIGS[name])
        bias = noise(8) if config.has_routing_bias else None

        def dense(routed) -> Tensor:
            scores, experts, weights = routed[:3]
            return torch.zeros_like(scores).scatter(1, experts, weights)

        compare(
            lambda x, b=bias, c=config: dense(ops.route(x, b, c)),
            lambda x, b=bias, c=config: dense(reference_routing.route(x, b, c)),
            [noise(11, 8)],
        )


@pytest.mark.parametrize("implementation", [ops.routed_experts, ops.experts._grouped])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 4, 1), (1, 8, 3), (13, 5, 2), (6, 16, 1), (40, 4, 4)])
def test_routed_experts(implementation, tokens, experts, chosen):
    picks = torch.stack(
        [torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:chosen] for i in range(tokens)]
    )
    inputs = [noise(tokens, 12), noise(tokens, chosen).abs(), noise(experts, 16, 12) * 0.3, noise(experts, 12, 8) * 0.3]
    compare(
        lambda x, w, a, b: implementation(x, picks, w, a, b),
        lambda x, w, a, b: reference_experts.routed_experts(x, picks, w, a, b),
        inputs,
    )


@pytest.mark.parametrize(
    ("inner", "width", "dtype", "message"),
    [
        (10, 32, torch.float32, "moe_intermediate_size is 10; on a GPU experts in torch.float32 need a multiple of 4"),
        (16, 20, torch.bfloat16, "hidden_size is 20; on a GPU experts in torch.bfloat16 need a multiple of 8"),
    ],
)
def test_widths_that_the_grouped_product_cannot_take_are_refused_by_name(inner, width, dtype, message):
    x, gate_up, down = (noise(*shape).to(dtype) for shape in ((4, width), (3, 2 * inner, width), (3, width, inner)))
    with pytest.raises(ConfigError, match=message):
        ops.experts._grouped(x, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), gate_up, down)


def test_experts_without_tokens_get_a_zero_gradient():
    x, picks = noise(4, 12), torch.full((4, 1), 2)
    weights, gate_up, down = torch.ones(4, 1), noise(3, 16, 12).requires_grad_(), noise(3, 12, 8).requires_grad_()
    ops.routed_experts(x, picks, weights, gate_up, down).sum().backward()
    for grad in (gate_up.grad, down.grad):
        assert grad[2].abs().sum() > 0
        assert not grad[:2].any()


def test_routed_experts_are_the_same_on_every_run():
    x, weights = noise(64, 12), noise(64, 4).softmax(-1)
    picks = noise(64, 8).topk(4).indices
    gate_up, down = noise(8, 16, 12), noise(8, 12, 8)
    first = ops.routed_experts(x, picks, weights, gate_up, down)
    assert all(torch.equal(ops.routed_experts(x, picks, weights, gate_up, down), first) for _ in range(5))


def test_queries_behind_keys_of_others_see_all_keys_up_to_their_own():
    query, key, value = (noise(2, 12, 3, width, seed=width) for width in (8, 9, 6))
    key = key[..., :8].contiguous()
    expected = ops.attention(query, key, value, 0.3)[:, 8:]
    torch.testing.assert_close(ops.attention(query[:, 8:], key, value, 0.3), expected)


def test_a_document_mask_of_some_queries_is_those_rows_of_the_whole():
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 4, 4]])
    queries = torch.tensor([0, 3, 5])
    assert torch.equal(ops.document_mask(documents, queries), ops.document_mask(documents)[:, queries])
