"""The decoding step's linear layer on the processor."""

import torch

from benthic.numerics.compare import assert_close
from benthic.numerics.reference.decode_matmul_fp8 import decode_matmul_fp8 as reference
from benthic.numerics.reference.quantisation import quantise_blocks
from benthic.ops.decode_matmul_fp8 import decode_matmul_fp8


def test_weights_are_used_with_their_factors():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 200), torch.randn(150, 200) / 14
    arguments = x, *quantise_blocks(weight)
    found = decode_matmul_fp8(*arguments)
    assert_close(found, reference(*arguments), "operation_fp32")
    assert 0 < (found - x @ weight.T).norm() < 0.05 * found.norm()
