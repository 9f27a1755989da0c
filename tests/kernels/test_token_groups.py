"""Into how many groups a dense weight gradient's tokens are cut, worked out for a GPU of 132 multiprocessors."""

import pytest
import torch

module = pytest.importorskip(
    "benthic.kernels.grouped_weight_gradient_fp8", reason="triton comes with CUDA builds of torch"
)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "groups"),
    [(16_384, 576, 2048, 5), (16_384, 4096, 512, 2), (16_384, 2048, 2048, 1), (512, 576, 2048, 1), (0, 256, 128, 1)],
)
def test_few_tiles_are_spread_over_groups_of_tokens(tokens, rows, columns, groups, monkeypatch):
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    assert module.token_groups(tokens, rows, columns, torch.device("cuda")) == groups
