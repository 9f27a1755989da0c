"""Launches of Triton kernels are told with their module and the bytes of their arguments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import triton_launches


def function(name, module="benthic.kernels.rms_norm"):
    return SimpleNamespace(__name__=name, __module__=module)


def described(name, /, module="rms_norm", **arguments):
    return triton_launches.described(function(name, f"benthic.kernels.{module}"), arguments)


def descriptor(*shape):
    base = torch.zeros(shape, dtype=torch.uint8)
    return SimpleNamespace(base=base, shape=list(shape), block_shape=[64, 128])


def test_a_launch_is_told_with_its_module_and_the_bytes_of_its_tensors():
    x, out = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.bfloat16)
    launch = described("_forward", x=x, again=x, out=out, rows=4)
    assert (launch.kernel, launch.label) == ("_forward", "rms_norm.forward")
    assert launch.bytes == 4 * 8 * (4 + 2)
    assert launch.flops == 0


def test_what_is_updated_in_place_moves_twice():
    of = {"master": torch.zeros(10), "gradient": torch.zeros(10, dtype=torch.bfloat16)}
    of |= {
        "exp_avg": torch.zeros(10),
        "exp_avg_sq": torch.zeros(10),
        "parameter": torch.zeros(10, dtype=torch.bfloat16),
    }
    assert described("_adamw", "adamw", **of).bytes == 10 * 28  # as the kernel's own docstring counts


def test_the_fp8_products_count_their_flops():
    left, weight, result = descriptor(300, 128), descriptor(2 * 64, 128), descriptor(300, 64)
    launch = described("_kernel", "grouped_matmul_fp8", a=left, b=weight, c=result, N=64)
    assert launch.flops == 2 * 300 * 128 * 64
    launch = described("_kernel", "grouped_weight_gradient_fp8", a=descriptor(64, 512), b=descriptor(32, 512))
    assert launch.flops == 2 * 64 * 32 * 512


def test_launches_are_recorded_inside_the_block_alone(monkeypatch):
    jit = pytest.importorskip("triton.runtime.jit")
    calls = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda self, *a, grid, warmup, **k: calls.append((a, k)))
    kernel = jit.JITFunction.__new__(jit.JITFunction)
    kernel.fn, kernel.arg_names = function("_forward"), ["x", "rows"]
    with triton_launches.recorded() as launches:
        kernel.run(torch.zeros(3), 3, grid=(1,), warmup=False, BLOCK=16)
        kernel.run(torch.zeros(3), 3, grid=(1,), warmup=True)
    kernel.run(torch.zeros(3), 3, grid=(1,), warmup=False)
    assert [launch.label for launch in launches] == ["rms_norm.forward"]
    assert len(calls) == 3
    assert calls[0][1] == {"BLOCK": 16}
