"""Products for one to four tokens against plain torch in float32."""

import pytest
import torch

kernels = pytest.importorskip("benthic.kernels.few_token_linear", reason="triton comes with CUDA builds of torch")
pytestmark = pytest.mark.usefixtures("poisoned")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize(("tokens", "out", "into"), [(1, 20, 2048), (2, 9, 96), (3, 6, 1100), (4, 33, 64)])
def test_a_few_tokens_equal_the_reference(tokens, out, into, dtype, device):
    generator = torch.Generator().manual_seed(tokens)
    wide = torch.randn(tokens, into + 8, generator=generator).to(device, DTYPE)
    weight = (torch.randn(out, into, generator=generator) * into**-0.5).to(device, DTYPE)
    x = wide[:, :into]  # rows of a joined product's output
    found = kernels.few_token_linear(x, weight, dtype)
    assert found.dtype == (dtype or DTYPE)
    expected = x.float() @ weight.float().t()
    assert (found.float() - expected).norm() / expected.norm() < (1e-5 if dtype else 2e-3)


def test_what_does_not_fit_is_refused(device):
    weight = torch.zeros(8, 32, device=device, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"x \[5, 32\] and weight \[8, 32\] do not fit; this kernel is for 1 to 4"):
        kernels.few_token_linear(torch.zeros(5, 32, device=device, dtype=DTYPE), weight)
    with pytest.raises(ValueError, match="contiguous channels"):
        kernels.few_token_linear(torch.zeros(32, 2, device=device, dtype=DTYPE).t(), weight)
