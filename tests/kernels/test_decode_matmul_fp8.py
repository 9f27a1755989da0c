"""The decoding step's linear layer with e4m3 weights against float32, with poisoned partial sums."""

import pytest
import torch

from benthic.numerics.reference.decode_matmul_fp8 import decode_matmul_fp8 as reference
from benthic.numerics.reference.quantisation import quantise_blocks

kernels = pytest.importorskip("benthic.kernels.decode_matmul_fp8", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def arguments_of(tokens, rows, depth, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, depth, generator=generator).to(DTYPE)
    weight = torch.randn(rows, depth, generator=generator) * (1 + torch.arange(rows)[:, None] // 128)
    # The interpreter (3.6) cuts subnormal e4m3 numbers, so there are none.
    values, scales = quantise_blocks(weight.sign() * weight.abs().clamp(min=0.2))
    return x.to(device), values.to(device), scales.to(device)


@pytest.mark.parametrize(("rows", "depth"), [(96, 1040), (300, 128), (33, 2064)])
@pytest.mark.parametrize("tokens", [1, 3, 17, 64])
def test_a_few_rows_equal_float32(tokens, rows, depth, device):
    arguments = arguments_of(tokens, rows, depth, device)
    actual, expected = kernels.decode_matmul_fp8(*arguments).float(), reference(*arguments).float()
    assert (actual - expected).norm() < 3e-3 * expected.norm()


def test_the_same_call_gives_the_same_bits(device):
    arguments = arguments_of(5, 40, 1040, device)
    assert torch.equal(kernels.decode_matmul_fp8(*arguments), kernels.decode_matmul_fp8(*arguments))


def test_wrong_operands_are_named(device):
    x, weight, scales = arguments_of(3, 40, 144, device)
    with pytest.raises(ValueError, match=r"scales must be torch.float32 \[1, 2\], not torch.float32 \[2, 1\]"):
        kernels.decode_matmul_fp8(x, weight, scales.T.contiguous())
    with pytest.raises(ValueError, match="x has 65 rows; this kernel is for up to 64"):
        kernels.decode_matmul_fp8(x[:1].expand(65, -1).contiguous(), weight, scales)
    assert kernels.decode_matmul_fp8(x[:0], weight, scales).shape == (0, 40)
