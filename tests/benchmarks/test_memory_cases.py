"""Cases of norms and attention at small sizes: every run that a processor can do agrees with the exact results."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.cases import attention, norm
from benchmarks.kernel_case import Case

MAKERS = {
    "norm": lambda: norm._norm(40, 24, 32, "cpu"),
    "norm of a sum": lambda: norm._norm_of_sum(40, 24, "cpu"),
    "heads": lambda: attention._heads(2, 5, 3, "cpu"),
    "rotary": lambda: attention._rotary(2, 5, 3, 1, 16, "cpu"),
    "attention": lambda: attention._attention(2, 16, 3, "cpu"),
}
NEEDS_A_GPU = {"cuDNN", "FlashAttention 3", "liger-kernel", "liger-kernel (in place)"}


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_runs_agree_with_exact_results(make: Callable[[], Iterator[Case]]):
    for case in make():
        assert case.bytes > 0
        for name, run in case.runs.items():
            if name not in NEEDS_A_GPU:
                assert case.check(run()) <= case.tolerance, name


def test_a_wrong_result_is_told_apart():
    case = next(norm._norm(40, 24, 24, "cpu"))
    assert case.check(case.runs["benthic"]() * 1.1) > case.tolerance


def test_attention_counts_the_half_that_is_not_masked():
    forward, backward = attention._attention(1, 64, 2, "cpu")
    assert forward.flops == 2 * 2 * 64**2 * 320 // 2
    assert backward.flops == pytest.approx(2.6 * forward.flops)
