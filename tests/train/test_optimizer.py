"""The optimiser against AdamW by its formula, its groups, and float32 masters of a bfloat16 model."""

import pytest
import torch

from benthic.config.train import BalanceConfig, OptimizerConfig, PrecisionConfig
from benthic.data import Batch
from benthic.errors import CheckpointError, ConfigError
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.train.ema import Average, OffloadedAverage
from benthic.train.loss import Scale, losses
from benthic.train.offload import Lanes
from benthic.train.optimizer import Optimizer, joint_norm
from tests.train.small import small_model, small_run

MATRIX = "model.layers.0.self_attn.o_proj.weight"
GAIN = "model.norm.weight"


def build(dtype=torch.float32, **settings):
    model = LanguageModel(small_model(), dtype=dtype)
    initialise(model, 0)
    return model, Optimizer(model, OptimizerConfig(**settings))


def set_gradients(model, size, seed=0):
    stream = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=stream)


def test_two_updates_follow_the_formula_with_decay_on_matrices_alone():
    model, optimizer = build(clip_norm=None, weight_decay=0.1, epsilon=1e-8)
    before = {name: one.detach().double().clone() for name, one in model.named_parameters()}
    first, second = ({name: torch.zeros_like(one) for name, one in before.items()} for _ in range(2))
    for count in (1, 2):
        set_gradients(model, 1.0, count)
        gradients = {name: one.grad.double().clone() for name, one in model.named_parameters()}
        optimizer.step(0.01, joint_norm(optimizer.gradient_norms()))
        for name in (MATRIX, GAIN, "model.embed_tokens.weight", "lm_head.weight"):
            first[name] = 0.9 * first[name] + 0.1 * gradients[name]
            second[name] = 0.95 * second[name] + 0.05 * gradients[name] ** 2
            decay = 0.0 if name == GAIN else 0.1
            step = (first[name] / (1 - 0.9**count)) / ((second[name] / (1 - 0.95**count)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - 0.01 * decay) - 0.01 * step
            torch.testing.assert_close(model.get_parameter(name).detach().double(), before[name], rtol=1e-5, atol=1e-6)


def test_moonlights_groups_decay_norm_gains_too():
    moved = []
    for groups in (("matrix", "embedding"), ("matrix", "embedding", "gain")):
        model, optimizer = build(decayed_groups=groups)
        set_gradients(model, 0.0)
        optimizer.step(0.5, joint_norm(optimizer.gradient_norms()))
        moved.append((model.get_parameter(GAIN)[0].item(), model.get_parameter(MATRIX).norm().item()))
    assert moved[0][0] == 1.0
    assert moved[1][0] == pytest.approx(0.95)
    assert moved[0][1] == moved[1][1]


def test_a_routing_bias_cannot_be_decayed():
    with pytest.raises(ConfigError, match="moved by the balancing rule alone"):
        OptimizerConfig(decayed_groups=("matrix", "routing_bias"))


def test_gradients_are_scaled_to_the_clip_norm_and_the_norm_is_that_before():
    model, optimizer = build(clip_norm=1.0)
    set_gradients(model, 3.0)
    expected = torch.stack([one.grad.norm() for one in model.parameters()]).norm()
    norm = joint_norm(optimizer.gradient_norms())
    optimizer.step(0.0, norm)
    after = torch.stack([one.grad.norm() for one in model.parameters()]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    assert after.item() == pytest.approx(1.0, rel=1e-4)


def test_a_bfloat16_model_adds_up_gradients_and_steps_in_float32():
    model, optimizer = build(torch.bfloat16, clip_norm=None, weight_decay=0.0)
    weight = model.get_parameter(MATRIX)
    for _ in range(300):
        # 2^-9 beside a sum above 1 is lost in bfloat16, which keeps 8 bits.
        (weight.sum() * 2.0**-9).backward()
    assert weight.grad is None
    assert optimizer.gradients()[MATRIX].unique().tolist() == [300 * 2.0**-9]
    start = optimizer.masters[MATRIX].clone()
    for _ in range(3):
        optimizer.step(1e-6, joint_norm(optimizer.gradient_norms()))
    # Steps far below a bfloat16's spacing stay in the master.
    assert (optimizer.masters[MATRIX] - start).abs().min() > 2e-6
    assert torch.equal(weight, optimizer.masters[MATRIX].bfloat16())


def test_moments_and_masters_that_are_taken_over_continue_bit_for_bit():
    results = []
    for stop in (False, True):
        model, optimizer = build(torch.bfloat16)
        for count in range(4):
            if stop and count == 2:
                masters = {name: one.clone() for name, one in optimizer.masters.items()}
                moments = {name: one.clone() for name, one in optimizer.moments().items()}
                model, optimizer = build(torch.bfloat16)
                optimizer.load(masters, moments, 2)
            optimizer.zero_gradients()
            for name, parameter in model.named_parameters():
                (parameter.float() * torch.sin(optimizer.masters[name] * (count + 1) + len(name))).sum().backward()
            optimizer.step(1e-2, joint_norm(optimizer.gradient_norms()))
        results.append(optimizer.masters)
    for name, master in results[0].items():
        assert torch.equal(master, results[1][name]), name


def test_missing_weights_are_named():
    _, optimizer = build()
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, first 'lm_head.weight'"):
        optimizer.load({name: one for name, one in optimizer.masters.items() if name != "lm_head.weight"}, {}, 0)


def test_a_gradient_that_is_not_finite_shows_in_its_own_norm_and_the_joint_one():
    model, optimizer = build()
    set_gradients(model, 1.0)
    model.get_parameter(MATRIX).grad[0, 0] = float("nan")
    norms = optimizer.gradient_norms()
    assert [name for name, norm in norms.items() if not norm.isfinite()] == [MATRIX]
    assert not joint_norm(norms).isfinite()


def test_the_average_follows_its_formula_and_is_gone_after_use():
    model, _ = build()
    average = Average(dict(model.named_parameters()), 0.9)
    with torch.no_grad():
        model.get_parameter(GAIN).fill_(2.0)
    weights = dict(model.named_parameters())
    average.update(weights, 1)
    assert average.tensors[GAIN][0].item() == pytest.approx(1 + (1 - 2 / 11))
    average.update(weights, 10_000)
    assert average.tensors[GAIN][0].item() == pytest.approx(2 - 0.9 * 2 / 11)
    with average.installed(model):
        assert model.get_parameter(GAIN)[0].item() == average.tensors[GAIN][0].item()
    assert model.get_parameter(GAIN)[0].item() == 2.0


def test_saved_tensors_of_another_model_or_without_moments_are_refused():
    _, optimizer = build()
    masters = dict(optimizer.masters)
    with pytest.raises(CheckpointError, match="has made 3 updates but lacks their moments"):
        optimizer.load(masters, {}, 3)
    moment = {f"exp_avg.{GAIN}": torch.ones_like(masters[GAIN])}
    with pytest.raises(CheckpointError, match=r"holds one moment of model.norm.weight, not both"):
        optimizer.load(masters, moment, 3)
    with pytest.raises(CheckpointError, match=r"the saved weight of model.norm.weight is \[7\]; the config makes it"):
        optimizer.load(masters | {GAIN: torch.ones(7)}, moment, 3)


def narrow(offload=False, **settings):
    """A bfloat16 model with bfloat16 moments: on a processor the way of a GPU, by the reference."""
    model = LanguageModel(small_model(), dtype=torch.bfloat16)
    initialise(model, 0)
    return model, Optimizer(model, OptimizerConfig(**settings), "bfloat16", offload)


def backward(model, count):
    for name, parameter in model.named_parameters():
        (parameter.float() * torch.sin(parameter.detach().float() * (count + 1) + len(name))).sum().backward()


def test_a_lone_gradient_stays_as_it_was_written_and_a_second_makes_a_float32_sum():
    model, optimizer = narrow()
    weight = model.get_parameter(MATRIX)
    (weight.sum() * 2.0**-9).backward()
    assert optimizer.gradients()[MATRIX].dtype == torch.bfloat16
    for _ in range(299):
        (weight.sum() * 2.0**-9).backward()
    assert optimizer.gradients()[MATRIX].dtype == torch.float32
    assert optimizer.gradients()[MATRIX].unique().tolist() == [300 * 2.0**-9]
    assert joint_norm(optimizer.gradient_norms()).item() == pytest.approx(300 * 2.0**-9 * weight.numel() ** 0.5)


def test_bfloat16_moments_train_like_float32_ones():
    ends = []
    for moments in ("float32", "bfloat16"):
        model = LanguageModel(small_model())
        initialise(model, 0)
        optimizer = Optimizer(model, OptimizerConfig(), moments)
        for count in range(8):
            optimizer.zero_gradients()
            backward(model, count)
            optimizer.step(1e-3, joint_norm(optimizer.gradient_norms()))
        assert {one.dtype for one in optimizer.moments().values()} == {getattr(torch, moments)}
        ends.append(model.get_parameter(MATRIX).detach())
    start = LanguageModel(small_model())
    initialise(start, 0)
    moved = (ends[0] - start.get_parameter(MATRIX)).norm()
    assert (ends[0] - ends[1]).norm() < 0.01 * moved


def test_nothing_changes_where_the_flag_says_so():
    for moments in ("float32", "bfloat16"):
        model = LanguageModel(small_model())
        initialise(model, 0)
        optimizer = Optimizer(model, OptimizerConfig(), moments)
        backward(model, 0)
        optimizer.step(1e-3, joint_norm(optimizer.gradient_norms()))
        before = {name: one.clone() for name, one in (optimizer.moments() | optimizer.masters).items()}
        optimizer.step(1e-3, joint_norm(optimizer.gradient_norms()), torch.tensor(False))
        for name, one in (optimizer.moments() | optimizer.masters).items():
            assert torch.equal(one, before[name]), name


def test_moments_and_masters_kept_elsewhere_come_to_the_same_bit_for_bit(monkeypatch):
    monkeypatch.setattr(Lanes.pieces, "__defaults__", (100,))
    ends = []
    for offload in (False, True):
        model, optimizer = narrow(offload)
        for count in range(3):
            optimizer.zero_gradients()
            backward(model, count)
            optimizer.step(1e-2, joint_norm(optimizer.gradient_norms()))
        ends.append(optimizer.masters | optimizer.moments() | dict(model.named_parameters()))
    for name, one in ends[0].items():
        assert torch.equal(one, ends[1][name]), name


def test_an_average_kept_elsewhere_comes_to_the_same_bit_for_bit():
    model, _ = build()
    weights = dict(model.named_parameters())
    here, elsewhere = Average(weights, 0.9), OffloadedAverage(weights, 0.9, torch.device("cpu"))
    for count in range(1, 5):
        elsewhere.let_go()
        with torch.no_grad():
            for one in weights.values():
                one.add_(torch.sin(one * count))
        here.update(weights, count)
        elsewhere.update(weights, count)
    for name, one in here.tensors.items():
        assert torch.equal(one, elsewhere.tensors[name]), name


def test_moments_that_bfloat16_would_hold_still_are_refused():
    with pytest.raises(ConfigError, match=r"optimizer.beta2 is 0.999; moments in bfloat16 need at most 0.996094"):
        small_run(optimizer=OptimizerConfig(beta2=0.999), precision=PrecisionConfig(moments="bfloat16"))
    small_run(optimizer=OptimizerConfig(beta2=0.999))


@pytest.mark.parametrize("name", ["offload_average", "offload_optimizer"])
def test_a_processor_has_nothing_to_move_away(name):
    with pytest.raises(ConfigError, match=f"memory.{name} moves things from a GPU to the processor, and device is cpu"):
        small_run(memory={name: True})


def test_ranks_split_states_and_move_none_of_them_away():
    with pytest.raises(ConfigError, match=r"memory.offload_optimizer is for one GPU, and the layout has 2 ranks"):
        small_run(device="cuda", memory={"offload_optimizer": True}, parallel={"shard": 2})


def test_an_average_that_is_not_kept_cannot_be_moved():
    with pytest.raises(ConfigError, match=r"memory\.offload_average needs optimizer\.ema_decay"):
        small_run(device="cuda", optimizer=OptimizerConfig(), memory={"offload_average": True})


def test_a_weight_that_is_embedding_and_head_of_two_losses_has_one_gradient_the_sum():
    tokens = torch.randint(0, 320, (2, 17), generator=torch.Generator().manual_seed(0))
    batch, found = Batch(tokens, torch.zeros_like(tokens)), []
    for optimised in (False, True):
        model = LanguageModel(small_model(tie_word_embeddings=True), dtype=torch.bfloat16)
        initialise(model, 0)
        optimizer = Optimizer(model, OptimizerConfig()) if optimised else None
        losses(model, batch, Scale(32, 2), False, 0.3, BalanceConfig()).total.backward()
        plain = {name: one.grad.float() for name, one in model.named_parameters() if one.grad is not None}
        found.append(plain if optimizer is None else optimizer.gradients())
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
