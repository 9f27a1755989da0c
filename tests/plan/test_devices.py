"""Devices: every number has a source, no rate exceeds its peak, and unknown names are refused."""

import pytest

from benthic.errors import ConfigError
from benthic.plan.devices import DEVICES, MEMORY_WORKS, find_device

WORKS = ["matmul", "weight_gradient", "grouped", "grouped_weight_gradient", "attention", "attention_backward", "decode"]


def test_the_h200_has_its_measured_rates():
    device = find_device("H200")
    assert device.memory_bandwidth.value == pytest.approx(4.22e12)
    assert device.rate("matmul", "bf16").value == 783e12
    assert device.rate("matmul", "fp8").value == 1238e12


@pytest.mark.parametrize("name", DEVICES)
def test_every_rate_is_below_its_peak_and_names_its_source(name):
    device = find_device(name)
    for precision, peak in device.peak.items():
        for work in WORKS:
            rate = device.rate(work, precision)
            assert 0 < rate.value <= peak
            assert rate.source
    for rate in (device.memory_bandwidth, device.node_bandwidth, device.network_bandwidth, device.dollars_per_hour):
        assert rate.value > 0
        assert rate.source


def test_a_rate_nobody_measured_takes_the_share_measured_elsewhere_and_says_so():
    rate = find_device("b200").rate("matmul", "bf16")
    assert rate.value == pytest.approx(783 / 989.4 * 2250e12)
    assert rate.source.startswith("79% of peak, as on NVIDIA H200")


@pytest.mark.parametrize("name", DEVICES)
def test_every_kind_of_memory_bound_kernel_has_a_bandwidth_at_most_a_copy_s_and_a_source(name):
    device = find_device(name)
    for kind in MEMORY_WORKS:
        rate = device.bandwidth(kind)
        assert 0 < rate.value <= device.memory_bandwidth.value
        assert rate.source
    assert 1e-6 <= device.launch_seconds.value < 1e-4
    assert device.launch_seconds.source


def test_a_bandwidth_nobody_measured_is_the_share_of_a_copy_measured_elsewhere_and_says_assumed():
    rate = find_device("h100").bandwidth("scatter_add")
    assert rate.value == pytest.approx(0.73 / 4.22 * 2.95e12)
    assert rate.source.startswith("assumed: 17% of a copy, as on NVIDIA H200")
    cpu = find_device("cpu").bandwidth("gated")
    assert (cpu.value, cpu.source) == (20e9, "assumed: as fast as a copy")


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown device 'h20'; allowed: a100, b200, cpu, h100, h200, h800"):
        find_device("h20")


def test_a_precision_the_device_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"device 'a100' has no fp8 arithmetic\nhint: allowed: bf16, fp32"):
        find_device("a100").rate("matmul", "fp8")
