"""A trace's events become a table: what each kernel was for, its work from the shapes recorded, gaps counted once."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks import step_profile
from benchmarks.gpu_timing import Limits
from benchmarks.triton_launches import Launch

LIMITS = Limits(copy=4e12, bf16=800e12, fp8=1600e12)


def host(number, name, shapes, types=()):
    arguments = {"External id": number, "Input Dims": shapes, "Input type": list(types)}
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": 0, "dur": 1, "args": arguments}


def kernel(name, number, start=0.0, duration=10.0, category="kernel"):
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "args": {"External id": number}}


def test_gaps_are_time_in_which_nothing_runs():
    events = [kernel("a", 1, 0, 10), kernel("b", 2, 5, 10), kernel("c", 3, 20, 10), host(1, "aten::mm", [])]
    assert step_profile.busy(events) == {
        "span_seconds": pytest.approx(30e-6), "busy_seconds": pytest.approx(25e-6),
        "idle_seconds": pytest.approx(5e-6), "longest_gap_seconds": pytest.approx(5e-6), "launches": 3,
    }  # fmt: skip


def test_a_step_without_kernels_is_all_zero():
    assert set(step_profile.busy([host(1, "aten::mm", [])]).values()) == {0}


def test_matmuls_go_by_shape_with_their_rate():
    events = [
        host(1, "aten::mm", [[1000, 2000], [2000, 400]], ["c10::BFloat16"] * 2),
        kernel("nvjet_tst_128x128", 1, duration=4.0),
        kernel("void cutlass::splitKreduce<float>(int)", 1, duration=1.0),
    ]
    (row,) = step_profile.operations(events, LIMITS)
    assert row["group"] == "matmul 1000 x 2000 x 400"
    assert row["calls"] == 1
    assert row["flops"] == 2 * 1000 * 2000 * 400
    assert row["tflops"] == pytest.approx(1.6e9 / 5e-6 / 1e12)
    assert row["share_of_limit"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "shapes", "group", "flops"),
    [
        ("aten::_grouped_mm", [[600, 64], [8, 64, 32]], "grouped matmul 600 x 64 x 32, 8 experts", 2 * 600 * 64 * 32),
        ("aten::_grouped_mm", [[64, 600], [600, 32]], "grouped matmul 64 x 600 x 32, weight gradient", 2_457_600),
        (
            "aten::_scaled_dot_product_cudnn_attention",
            [[2, 4, 128, 192], [2, 4, 128, 192], [2, 4, 128, 128]],
            "attention forward 4 heads 192/128",
            2 * 4 * 128**2 * 320,
        ),
        (
            "aten::_scaled_dot_product_cudnn_attention_backward",
            [[2, 4, 128, 128], [2, 4, 128, 192], [2, 4, 128, 192], [2, 4, 128, 128]],
            "attention backward 4 heads 192/128",
            2 * 4 * 128**2 * (3 * 192 + 2 * 128),
        ),
        ("aten::_scaled_mm_v2", [[128, 256], [256, 64]], "matmul fp8 128 x 256 x 64", 2 * 128 * 256 * 64),
        ("aten::bmm", [[3, 128, 256], [3, 256, 64]], "matmul 3 x 128 x 256 x 64", 2 * 3 * 128 * 256 * 64),
        ("aten::addmm", [[64], [128, 256], [256, 64]], "matmul 128 x 256 x 64", 2 * 128 * 256 * 64),
    ],
)  # fmt: skip
def test_work_follows_from_shapes(name, shapes, group, flops):
    work = step_profile.work_of("some_kernel", host(1, name, shapes))
    assert (work.group, work.flops) == (group, flops)


def test_copies_and_elementwise_count_bytes_in_and_out():
    copied = step_profile.work_of(
        "void at::native::elementwise<...>", host(1, "aten::copy_", [[10, 10], [10, 10]], ["float", "c10::BFloat16"])
    )
    assert (copied.group, copied.bytes) == ("copy: float from BFloat16", 600)
    added = step_profile.work_of(
        "void at::native::vectorized<...>", host(1, "aten::add", [[10, 10], [10, 10], []], ["float", "float", "Scalar"])
    )
    assert (added.group, added.bytes) == ("add", 1200)
    filled = step_profile.work_of("void fill<int>()", host(1, "aten::fill_", [[10, 10], []], ["float", "Scalar"]))
    assert filled.bytes == 400


def test_triton_kernels_and_those_without_a_host_operation_go_by_their_own_name():
    assert step_profile.work_of("rms_norm_forward", None).group == "rms_norm_forward"
    assert step_profile.work_of("rms_norm_forward", host(1, "RMSNormBackward", [])).group == "rms_norm_forward"
    name = "void at::native::index_kernel<float, 4>(int, float*)"
    assert step_profile.work_of(name, None).group == "at::native::index_kernel"


def test_triton_kernels_of_one_name_are_told_apart_by_the_order_of_their_launches():
    events = [kernel("_forward", 3, 30, 2), kernel("_forward", 1, 10, 4), kernel("_take", 2, 20, 1)]
    for number, event in zip((3, 1, 2), events, strict=True):
        event["args"]["correlation"] = number
    launches = [
        Launch("_forward", "rms_norm.forward", bytes=8e6),
        Launch("_take", "permutation.take", bytes=0),
        Launch("_forward", "swiglu.forward", bytes=4e6),
    ]
    rows = {row["group"]: row for row in step_profile.operations(events, LIMITS, launches)}
    assert rows["rms_norm.forward"]["seconds"] == pytest.approx(4e-6)
    assert rows["rms_norm.forward"]["share_of_limit"] == pytest.approx(0.5)
    assert rows["swiglu.forward"]["gigabytes_per_second"] == pytest.approx(2000)
    assert set(rows) == {"rms_norm.forward", "swiglu.forward", "permutation.take"}
    # An event more than there were launches: nobody knows which is which.
    assert "_forward" in {row["group"] for row in step_profile.operations([*events, events[0] | {}], None, launches)}


def test_rows_are_longest_first_and_shares_add_up():
    events = [kernel("short", 1, duration=1), kernel("long_one", 2, duration=3), kernel("long_one", 3, duration=3)]
    rows = step_profile.operations(events, None)
    assert [(row["group"], row["calls"]) for row in rows] == [("long_one", 2), ("short", 1)]
    assert sum(row["share"] for row in rows) == pytest.approx(1)


def test_the_table_fits_sixty_lines():
    events = [kernel(f"kernel_{number}", number, number * 20) for number in range(100)]
    result = step_profile.busy(events) | {
        "operations": step_profile.operations(events, LIMITS),
        "step_seconds": {"median": 0.002},
    }
    lines = step_profile.table(result).splitlines()
    assert len(lines) <= 60
    assert "step 2.0 ms" in lines[0]
    assert any(line.startswith("52 more") for line in lines)


def test_a_recorded_step_has_host_operations_with_their_shapes():
    weight = torch.randn(4, 8)
    events = step_profile.trace(lambda: torch.randn(2, 4) @ weight, [ProfilerActivity.CPU], shapes=True)
    (found,) = [one for one in events if one["name"] == "aten::mm"]
    assert found["cat"] == "cpu_op"
    assert found["args"]["Input Dims"][:2] == [[2, 4], [4, 8]]
    assert "External id" in found["args"]
    assert step_profile.work_of("gemm", found).flops == 2 * 2 * 4 * 8
