"""One layer's time against DeepSeek's published trace: 4 expert layers, one forward and one backward, 124 ms busy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benthic.config import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.devices import DEVICES, Rate
from benthic.plan.layer_time import Overheads, head_pieces, layer_pieces
from benthic.plan.traffic import layer_traffic
from benthic.plan.training import Training

V3 = ModelConfig.from_pretrained("deepseek-v3")
LITE = ModelConfig.from_pretrained("deepseek-v2-lite")
H200, H800 = DEVICES["h200"], DEVICES["h800"]
LAYOUT = ParallelConfig.parse("pp=16,schedule=dualpipe,fsdp=128,zero=1,ep=64")
TRAINING = Training(4096, precision="fp8", recomputation="up_projections")
TRACE = {
    "weight": 0.251,
    "routed experts": 0.176,
    "attention core": 0.168,
    "other matrices": 0.144,
    "memory-bound": 0.261,
}


@pytest.mark.parametrize("kind", TRACE)
def test_kernel_rates_give_back_the_shares_of_the_trace(kind):
    seconds = dict.fromkeys(TRACE, 0.0)
    for piece in layer_pieces(V3, TRAINING, H800, LAYOUT, 30, Overheads(memory_share=0.261)):
        if piece.part == "memory-bound":
            seconds["memory-bound"] += piece.seconds
        elif piece.phase == "weight":
            seconds["weight"] += piece.seconds
        elif piece.part != "exchange":
            seconds[piece.part] += piece.seconds
    assert 4 * seconds[kind] == pytest.approx(TRACE[kind] * 0.124, rel=0.08)


def exchanges(pieces):
    return (sum(p.seconds for p in pieces if p.phase == f"{way} exchange") for way in ("forward", "backward"))


def test_the_exchange_sends_gradients_wider_than_tokens_except_by_deepseek_s_kernels_and_nothing_on_one_gpu():
    there, back = exchanges(layer_pieces(V3, TRAINING, H800, LAYOUT, 30, Overheads()))
    assert back > 1.3 * there > 0
    there, back = exchanges(layer_pieces(V3, TRAINING, H800, LAYOUT, 30, Overheads(forwarding=True)))
    assert there == back > 0
    alone = layer_pieces(V3, TRAINING, H800, ParallelConfig(), 30, Overheads())
    assert sum(piece.seconds for piece in alone if piece.part == "exchange") == 0


def test_a_prediction_layer_joins_two_states_and_needs_a_second_head():
    last, extra = (
        sum(
            piece.seconds
            for piece in layer_pieces(V3, TRAINING, H800, LAYOUT, layer, Overheads())
            if piece.phase == "weight"
        )
        for layer in (60, 61)
    )
    assert extra > last
    one = V3.replace(num_nextn_predict_layers=0)
    overheads = Overheads(memory_share=0.261)
    heads = [sum(p.seconds for p in head_pieces(c, TRAINING, H800, LAYOUT, overheads)) for c in (one, V3)]
    assert heads[1] == pytest.approx(2 * heads[0])


def test_fp8_pays_for_casts_and_takes_less_than_the_trace_shows():
    def memory_bound(training: Training) -> float:
        pieces = layer_pieces(V3, training, H800, LAYOUT, 30, Overheads())
        return sum(piece.seconds for piece in pieces if piece.part.startswith("memory-bound"))

    narrow, wide = memory_bound(TRAINING), memory_bound(Training(4096, recomputation="up_projections"))
    # benthic's kernels read and write once what the traced framework passes over again.
    assert 0.5 < 4 * narrow / (0.261 * 0.124) < 1
    assert wide < narrow < 2 * wide


def test_small_layers_take_the_time_of_their_launches():
    def seconds(training: Training) -> float:
        pieces = layer_pieces(LITE, training, H200, ParallelConfig(), 5, Overheads())
        return sum(piece.seconds for piece in pieces)

    one, two = seconds(Training(1)), seconds(Training(2))
    # Weights' bytes aside, nothing but launches: twice the tokens take hardly longer.
    assert 1 < two / one < 1.1
    launches = sum(one.launches for one in layer_traffic(LITE, 5, "bf16"))
    assert one > launches * H200.launch_seconds.value
    assert seconds(Training(4096, 4)) > 10 * one


def test_experts_with_few_rows_compute_tiles_they_do_not_need():
    def grouped(training: Training, part: str) -> float:
        pieces = layer_pieces(LITE, training, H200, ParallelConfig(), 5, Overheads())
        return sum(one.seconds for one in pieces if one.part == part and one.phase == "forward")

    few, many = (grouped(Training(2048, batch), "routed experts") / batch for batch in (1, 16))
    # 192 rows an expert fill 1.5 tiles of 128, 3072 rows 24.
    assert few / many == pytest.approx((1 + 64 / 192) / (1 + 64 / 3072), rel=0.01)


def test_a_trace_replaces_every_rate_of_memory_and_launches():
    slow = replace(H200, launch_seconds=Rate(1.0, "test"), measured_bandwidth={"elementwise": Rate(1.0, "test")})
    measured, other = (
        layer_pieces(LITE, Training(4096), device, ParallelConfig(), 5, Overheads(memory_share=0.3))
        for device in (H200, slow)
    )
    assert measured == other
