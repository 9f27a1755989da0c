"""The exchange alone: an expert layer spread over ranks gives the outputs and gradients of one process, and a token's
row goes once to each rank."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from benthic.config.parallel import ParallelConfig
from benthic.model.feed_forward import ExpertLayer
from benthic.model.float8 import use_float8
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.parallel.exchange import Agreement, exchanged
from benthic.parallel.experts import ExchangedExpertLayer, without_repeats
from benthic.parallel.world import World, joined
from tests.parallel.processes import on_ranks
from tests.train.small import small_model

# Six of the eight experts of two groups: over four ranks, each of which has a group, always two ranks.
CONFIG = small_model(n_routed_experts=16, num_experts_per_tok=6, n_group=4, topk_group=2)
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


def own_part(whole: ExpertLayer, ranks: int, world: World, narrow: bool = False) -> ExchangedExpertLayer:
    for name, one in list(whole.experts.named_parameters()):
        setattr(whole.experts, name, torch.nn.Parameter(one.detach().chunk(ranks)[world.rank].clone()))
    group = world.experts["expert"].get_group()
    return ExchangedExpertLayer(whole.gate, whole.experts, whole.shared_experts, group, narrow)


def skew(whole: ExpertLayer) -> None:
    """All tokens to the first half of the experts."""
    whole.gate.e_score_correction_bias[CONFIG.n_routed_experts // 2 :] = -10.0


def spread_out(ranks: int, skewed: bool) -> dict[str, torch.Tensor]:
    """This rank's outputs and gradients, of its share of the sequences and of the experts."""
    with joined(ParallelConfig(shard=ranks, expert=ranks), CONFIG, torch.device("cpu")) as world:
        whole, (x, grad) = layer(), inputs()
        if skewed:
            skew(whole)
        spread = own_part(whole, ranks, world)
        mine = x.chunk(ranks)[world.rank].clone().requires_grad_()
        out, routing = spread(mine)
        out.backward(grad.chunk(ranks)[world.rank])
        found = {"out": out.detach(), "x": mine.grad, "chosen": routing.experts}
        return found | {name: one.grad for name, one in spread.named_parameters()}


@pytest.mark.parametrize(("ranks", "skewed"), [(2, False), (2, True), (4, False)])
def test_a_spread_layer_is_the_layer_of_one_process(ranks, skewed):
    found = on_ranks(ranks, spread_out, ranks, skewed)
    whole, (x, grad) = layer(), inputs()
    if skewed:
        skew(whole)
    x.requires_grad_()
    out, routing = whole(x)
    out.backward(grad)
    assert torch.equal(torch.cat([one["chosen"] for one in found]), routing.experts)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([one["out"] for one in found]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([one["x"] for one in found]), x.grad, **close)
    for name, expected in whole.named_parameters():
        parts = [one[name] for one in found]
        joint = torch.cat(parts) if name.startswith("experts.") else torch.stack(parts).sum(0)
        torch.testing.assert_close(joint, expected.grad, msg=name, **close)


def bytes_given() -> tuple[list[int], int]:
    """The bytes of each message of a forward and backward pass on one rank, and its tokens."""
    given, plain = [], dist.all_to_all_single
    with joined(ParallelConfig(shard=4, expert=4), CONFIG, torch.device("cpu")) as world:
        spread = own_part(layer(), 4, world)

        def counted(output, input, *arguments, **named):
            given.append(input.nbytes)
            return plain(output, input, *arguments, **named)

        dist.all_to_all_single = counted
        mine = inputs()[0].chunk(4)[world.rank].clone().requires_grad_()
        spread(mine)[0].sum().backward()
        dist.all_to_all_single = plain
        return given, mine.shape[0] * mine.shape[1]


def test_a_row_goes_once_to_each_of_a_tokens_ranks():
    """To two ranks where six experts are chosen: a third of the bytes of a row for each choice."""
    ranks = on_ranks(4, bytes_given)
    row, choices = 4 * CONFIG.hidden_size, 4 * 2 * CONFIG.num_experts_per_tok
    for messages, tokens in ranks:
        told, of_choices, rows, *_ = messages
        assert (told, of_choices, rows) == (4 * 2 * 8, 2 * tokens * choices, 2 * tokens * row)
        assert len(messages) == 7
    # What comes home, and in backward what goes and comes, is as much over all ranks.
    total = sum(sum(messages[3:]) for messages, _ in ranks)
    assert total == sum(2 * tokens * (3 * row + choices) for _, tokens in ranks)


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6))
def test_a_rank_is_named_by_the_first_of_its_choices(ranks):
    found = without_repeats(torch.tensor(ranks)).tolist()
    assert found == [[-1 if one in row[:k] else one for k, one in enumerate(row)] for row in ranks]


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
        spread = own_part(whole, RANKS, world, narrow=True)
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
    # What comes home from a rank is rounded to bfloat16: half a unit of the last place for each of the ranks.
    torch.testing.assert_close(torch.cat([found["out"] for found in ranks]), out.detach(), rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(torch.cat([found["x"] for found in ranks]), x.grad, rtol=2e-2, atol=1e-2)
    for name, one in whole.experts.named_parameters():
        joint = torch.cat([found[f"experts.{name}"] for found in ranks])
        assert float((joint - one.grad).float().norm() / one.grad.float().norm()) < 0.02, name


def tagged_rows() -> tuple[torch.Tensor, int, bool]:
    """Rows that say where they are from, sent with uneven counts, and back again."""
    with joined(ParallelConfig(shard=RANKS, expert=RANKS), CONFIG, torch.device("cpu")) as world:
        counts = torch.tensor([[[2, 5], [4, 4]], [[1, 1], [0, 0]]])[world.rank]
        rows = torch.arange(int(counts[:, 0].sum()), dtype=torch.float64)[:, None] + 100 * world.rank
        splits = Agreement(counts, dist.group.WORLD).splits()
        there = exchanged(rows, splits)
        return there[:, 0], splits.choices, torch.equal(exchanged(there, splits.reversed()), rows)


def test_rows_arrive_source_by_source_and_come_back_in_order():
    (first, first_choices, back), (second, second_choices, also_back) = on_ranks(RANKS, tagged_rows)
    assert first.tolist() == [0, 1, 100]
    assert second.tolist() == [2, 3, 4, 5]
    assert (first_choices, second_choices) == (6, 4)
    assert back
    assert also_back
