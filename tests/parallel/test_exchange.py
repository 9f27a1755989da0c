"""The exchange alone: an expert layer spread over ranks gives the outputs and gradients of one process."""

import pytest
import torch
import torch.distributed as dist

from benthic.config.parallel import ParallelConfig
from benthic.model.feed_forward import ExpertLayer
from benthic.model.float8 import use_float8
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.parallel.exchange import agree_on_splits, exchanged
from benthic.parallel.experts import ExchangedExpertLayer
from benthic.parallel.world import joined
from tests.parallel.processes import on_ranks
from tests.train.small import small_model

CONFIG = small_model()
RANKS = 2


def layer() -> ExpertLayer:
    torch.manual_seed(0)
    made = ExpertLayer(CONFIG, None, torch.float32)
    with torch.no_grad():
        for one in made.parameters():
            one.copy_(torch.randn(one.shape) * 0.3)
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 6, CONFIG.hidden_size), torch.randn(4, 6, CONFIG.hidden_size)


def spread_out(skewed: bool) -> dict[str, torch.Tensor]:
    """This rank's outputs and gradients, of half the sequences and half the experts."""
    with joined(ParallelConfig(shard=RANKS, expert=RANKS), CONFIG, torch.device("cpu")) as world:
        whole, (x, grad) = layer(), inputs()
        if skewed:  # all tokens to the first rank's experts
            whole.gate.e_score_correction_bias[CONFIG.n_routed_experts // 2 :] = -10.0
        for name, one in list(whole.experts.named_parameters()):
            setattr(whole.experts, name, torch.nn.Parameter(one.detach().chunk(RANKS)[world.rank].clone()))
        group = world.experts["expert"].get_group()
        spread = ExchangedExpertLayer(whole.gate, whole.experts, whole.shared_experts, group)
        mine = x.chunk(RANKS)[world.rank].clone().requires_grad_()
        out, routing = spread(mine)
        out.backward(grad.chunk(RANKS)[world.rank])
        found = {"out": out.detach(), "x": mine.grad, "chosen": routing.experts}
        return found | {name: one.grad for name, one in spread.named_parameters()}


@pytest.mark.parametrize("skewed", [False, True])
def test_a_spread_layer_is_the_layer_of_one_process(skewed):
    ranks = on_ranks(RANKS, spread_out, skewed)
    whole, (x, grad) = layer(), inputs()
    if skewed:
        whole.gate.e_score_correction_bias[CONFIG.n_routed_experts // 2 :] = -10.0
    x.requires_grad_()
    out, routing = whole(x)
    out.backward(grad)
    assert torch.equal(torch.cat([found["chosen"] for found in ranks]), routing.experts)
    torch.testing.assert_close(torch.cat([found["out"] for found in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([found["x"] for found in ranks]), x.grad)
    for name, one in whole.named_parameters():
        parts = [found[name] for found in ranks]
        joint = torch.cat(parts) if name.startswith("experts.") else torch.stack(parts).sum(0)
        torch.testing.assert_close(joint, one.grad, msg=name)


FLOAT8 = small_model(hidden_size=64, moe_intermediate_size=48)


def float8_layer() -> ExpertLayer:
    torch.manual_seed(0)
    model = LanguageModel(FLOAT8, dtype=torch.bfloat16)
    initialise(model, 0)
    use_float8(model)
    return model.model.layers[1].mlp


def spread_out_in_float8() -> dict[str, torch.Tensor]:
    with joined(ParallelConfig(shard=RANKS, expert=RANKS), FLOAT8, torch.device("cpu")) as world:
        whole = float8_layer()
        for name, one in list(whole.experts.named_parameters()):
            setattr(whole.experts, name, torch.nn.Parameter(one.detach().chunk(RANKS)[world.rank].clone()))
        group = world.experts["expert"].get_group()
        spread = ExchangedExpertLayer(whole.gate, whole.experts, whole.shared_experts, group, narrow=True)
        x, grad = wide_inputs()
        mine = x.chunk(RANKS)[world.rank].clone().requires_grad_()
        out, _ = spread(mine)
        out.backward(grad.chunk(RANKS)[world.rank])
        found = {"out": out.detach(), "x": mine.grad}
        return found | {name: one.grad for name, one in spread.named_parameters() if "experts." in name}


def wide_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 8, 64).bfloat16(), torch.randn(4, 8, 64).bfloat16()


def test_a_layer_whose_rows_travel_in_float8_is_the_float8_layer_of_one_process():
    ranks = on_ranks(RANKS, spread_out_in_float8)
    whole, (x, grad) = float8_layer(), wide_inputs()
    x.requires_grad_()
    out, _ = whole(x)
    out.backward(grad)
    assert torch.equal(torch.cat([found["out"] for found in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([found["x"] for found in ranks]), x.grad, rtol=2e-2, atol=1e-2)
    for name, one in whole.experts.named_parameters():
        joint = torch.cat([found[f"experts.{name}"] for found in ranks])
        assert float((joint - one.grad).float().norm() / one.grad.float().norm()) < 0.02, name


def tagged_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that say where they are from, sent to two experts a rank with uneven counts, and back again."""
    with joined(ParallelConfig(shard=RANKS, expert=RANKS), CONFIG, torch.device("cpu")) as world:
        counts = torch.tensor([[2, 0, 1, 3], [0, 1, 0, 0]])[world.rank]
        rows = torch.arange(int(counts.sum()), dtype=torch.float64)[:, None] + 100 * world.rank
        splits = agree_on_splits(counts, dist.group.WORLD)
        there = exchanged(rows, splits)
        return there[:, 0], splits.experts, torch.equal(exchanged(there, splits.reversed()), rows)


def test_rows_go_to_their_experts_source_by_source_and_come_back_in_order():
    (first, first_experts, back), (second, second_experts, also_back) = on_ranks(RANKS, tagged_rows)
    assert first.tolist() == [0, 1, 100]
    assert first_experts.tolist() == [0, 0, 1]
    assert second.tolist() == [2, 3, 4, 5]
    assert second_experts.tolist() == [0, 1, 1, 1]
    assert back
    assert also_back
