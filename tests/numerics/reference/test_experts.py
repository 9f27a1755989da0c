"""The reference of the routed experts, where it has nothing to do."""

import torch

from benthic.numerics.reference.experts import routed_experts
from benthic.ops import routed_experts as fast


def test_no_tokens_give_no_rows():
    x, weights = torch.zeros(0, 8), torch.zeros(0, 2)
    experts = torch.zeros(0, 2, dtype=torch.int64)
    gate_up, down = torch.ones(4, 6, 8), torch.ones(4, 8, 3)
    for function in (routed_experts, fast):
        out = function(x, experts, weights, gate_up, down)
        assert (out.shape, out.dtype) == ((0, 8), torch.float32)
