"""A model in FP8: the same tensors under the same names, nearly the same losses, nothing quantised that must not."""

import copy
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F

from benthic import load_model, save_model
from benthic.config import ModelConfig
from benthic.config.train import OptimizerConfig
from benthic.errors import ConfigError
from benthic.model import LanguageModel
from benthic.model.cache import Cache
from benthic.model.float8 import Float8ExpertLayer, Float8Linear, Float8OutputLinear, use_float8, weights_unchanged
from benthic.model.initialisation import initialise
from benthic.ops import float8
from benthic.train.ema import Average
from benthic.train.optimizer import Optimizer
from benthic.train.recomputation import recompute
from tests.model.configs import tiny

SMALL = ModelConfig(
    vocab_size=64, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=64, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
    v_head_dim=16, q_lora_rank=48, n_routed_experts=4, moe_intermediate_size=48, num_experts_per_tok=2,
    n_shared_experts=1, first_k_dense_replace=1, num_nextn_predict_layers=1, initializer_range=0.05,
)  # fmt: skip
STEPS = 20


def model(in_float8: bool, config: ModelConfig = SMALL) -> LanguageModel:
    made = LanguageModel(config, dtype=torch.bfloat16)
    initialise(made, 0)
    if in_float8:
        use_float8(made)
    return made


class Training:
    """AdamW on float32 masters, and texts that repeat."""

    def __init__(self, trained: LanguageModel) -> None:
        self.model = trained
        self.masters = {name: weight.detach().float() for name, weight in trained.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=3e-3)
        self.stream = torch.Generator().manual_seed(0)
        self.text = torch.randint(0, 64, (1, 13), generator=self.stream).repeat(4, 2)

    def update(self) -> float:
        tokens = (self.text + torch.randint(0, 3, (4, 1), generator=self.stream)) % 64
        states = self.model.states(tokens[:, :-1], num_predictions=1)
        logits = F.linear(states.hidden, self.model.head_weight).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        further = F.linear(states.predictions[0], self.model.head_weight).float()
        (loss + 0.1 * F.cross_entropy(further.flatten(0, 1), tokens[:, 2:].flatten())).backward()
        for name, weight in self.model.named_parameters():
            self.masters[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.masters[name])
        return float(loss.detach())


def test_losses_follow_those_in_bfloat16():
    plain, quantised = Training(model(False)), Training(model(True))
    pairs = [(plain.update(), quantised.update()) for _ in range(STEPS)]
    assert pairs[-1][0] < 0.5 * pairs[0][0]
    assert pairs[-1] != (pairs[-1][0], pairs[-1][0])
    apart = [abs(one - other) / one for one, other in pairs]
    assert sum(apart) / STEPS < 0.03


def test_every_parameter_gets_a_gradient():
    trained = model(True)
    states = trained.states(torch.arange(24).view(2, 12), num_predictions=1)
    (F.linear(states.hidden, trained.head_weight).float().logsumexp(-1).sum() + states.predictions[0].sum()).backward()
    assert [name for name, weight in trained.named_parameters() if weight.grad is None] == []


def test_a_resumed_run_goes_on_bit_by_bit():
    run = Training(model(True))
    for _ in range(3):
        run.update()
    resumed = Training(model(True))
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.masters = {name: master.clone() for name, master in run.masters.items()}
    resumed.optimizer = torch.optim.AdamW(resumed.masters.values(), lr=3e-3)
    resumed.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    resumed.stream.set_state(run.stream.get_state())
    assert [run.update() for _ in range(3)] == [resumed.update() for _ in range(3)]


@pytest.mark.parametrize("kind", ["up_projections", "layer"])
def test_what_is_computed_again_changes_no_bit(kind):
    gradients = []
    for chosen in ("none", kind):
        trained = model(True)
        recompute(trained, chosen)
        states = trained.states(torch.arange(24).view(2, 12), num_predictions=1)
        (states.hidden.float().square().sum() + states.predictions[0].float().sum()).backward()
        gradients.append({name: weight.grad for name, weight in trained.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is not None:
            assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("kind", ["up_projections", "layer"])
def test_recomputation_may_be_asked_for_before(kind):
    before, after = model(False), model(True)
    recompute(before, kind)
    use_float8(before)
    recompute(after, kind)
    gradients = []
    for trained in (before, after):
        trained(torch.arange(12)[None]).float().logsumexp(-1).sum().backward()
        gradients.append([weight.grad for weight in trained.parameters() if weight.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_names_parameters_and_state_stay(tmp_path):
    plain = model(False)
    quantised = model(False)
    before = dict(quantised.named_parameters())
    use_float8(quantised)
    assert {name: id(weight) for name, weight in quantised.named_parameters()} == {
        name: id(weight) for name, weight in before.items()
    }
    assert quantised.state_dict().keys() == plain.state_dict().keys()
    quantised(torch.arange(8)[None])
    save_model(plain, tmp_path / "plain", weights="bf16")
    save_model(quantised, tmp_path / "quantised", weights="bf16")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "quantised").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "quantised" / name).read_bytes()
    loaded = load_model(tmp_path / "quantised", dtype=torch.bfloat16)
    assert not any(isinstance(module, Float8Linear) for module in loaded.modules())


def test_what_the_paper_keeps_in_high_precision_is_kept():
    trained = LanguageModel(SMALL, dtype=torch.bfloat16)
    report = use_float8(trained)
    assert report.kept == {}
    assert len(report.quantised) == 3 * 5 + 3 + 2 * (2 + 3)  # attention, dense, experts of the layer and the prediction
    left = {name for name, weight in trained.named_parameters() if weight.ndim > 1} - set(report.quantised)
    assert left == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.eh_proj.weight",
    }


@pytest.fixture
def quantised(monkeypatch) -> list[torch.Tensor]:
    """First weights of everything that is quantised."""
    made = []
    plain = float8.quantise_weight
    monkeypatch.setattr(float8, "quantise_weight", lambda *weights: made.append(weights[0]) or plain(*weights))
    return made


def test_weights_are_quantised_once_while_they_are_unchanged(quantised):
    trained, tokens = model(True), torch.arange(8)[None]
    with weights_unchanged(trained):
        for _ in range(2):
            trained(tokens).float().sum().backward()
    assert len(quantised) == len({id(one) for one in quantised}) > 10
    trained(tokens)
    assert len(quantised) > len({id(one) for one in quantised})


def edit_data(trained: LanguageModel) -> None:
    for weight in trained.parameters():
        weight.data.mul_(1.1)  # torch does not count this as a change


def load_others(trained: LanguageModel) -> None:
    trained.load_state_dict({name: 1.1 * tensor for name, tensor in trained.state_dict().items()})


def load_by_assignment(trained: LanguageModel) -> None:
    trained.load_state_dict({name: 1.1 * tensor for name, tensor in trained.state_dict().items()}, assign=True)


def take_a_step(trained: LanguageModel) -> None:
    optimizer = Optimizer(trained, OptimizerConfig())
    optimizer.zero_gradients()
    trained(torch.arange(8)[None]).float().logsumexp(-1).sum().backward()
    optimizer.step(0.1, torch.ones(()))


def install_averages(trained: LanguageModel) -> AbstractContextManager[None]:
    average = Average({name: 1.1 * tensor for name, tensor in trained.state_dict().items()}, 0.9)
    installed = average.installed(trained)
    installed.__enter__()
    return installed


@pytest.mark.parametrize("change", [edit_data, load_others, load_by_assignment, take_a_step, install_averages])
def test_a_changed_weight_is_never_used_as_it_was(change):
    trained, tokens = model(True), torch.arange(8)[None]
    with weights_unchanged(trained):
        trained(tokens).float().logsumexp(-1).sum().backward()
    lasting = change(trained)
    fresh = model(True)
    for name, tensor in fresh.state_dict().items():
        tensor.copy_(trained.state_dict()[name])
    with torch.no_grad(), weights_unchanged(trained):
        assert torch.equal(trained(tokens), fresh(tokens))
    assert not torch.equal(fresh(tokens), model(True)(tokens))
    del lasting


def test_a_change_where_none_may_happen_is_refused():
    trained, tokens = model(True), torch.arange(8)[None]
    with weights_unchanged(trained):
        trained(tokens)
        load_others(trained)
        with pytest.raises(RuntimeError, match="a weight was changed inside `weights_unchanged`"):
            trained(tokens)
    assert trained(tokens).isfinite().all()


def test_a_width_that_does_not_fit_is_left_and_told(caplog):
    config = SMALL.replace(moe_intermediate_size=40)
    trained = LanguageModel(config, dtype=torch.bfloat16)
    with caplog.at_level("INFO", logger="benthic"):
        report = use_float8(trained)
    assert "float8: 10 left in bfloat16: a width of 40 is no multiple of 16" in caplog.text
    assert all(".mlp." in name for name in report.kept)
    assert len(report.quantised) == 3 * 5 + 3
    assert not any(isinstance(module, Float8ExpertLayer) for module in trained.modules())
    initialise(trained, 0)
    assert trained(torch.arange(8)[None]).isfinite().all()


@pytest.mark.parametrize("heads", [2, 4])
def test_a_model_without_latents_trains_too(heads):
    config = tiny(hidden_size=64, intermediate_size=96, num_key_value_heads=heads, qkv_bias=True, output_bias=True)
    trained = model(True, config)
    assert sum(type(module) is Float8OutputLinear for module in trained.modules()) == 3
    found, expected = trained(torch.arange(12)[None]), model(False, config)(torch.arange(12)[None])
    assert (found - expected).norm() < 0.1 * expected.norm()
    found.float().logsumexp(-1).sum().backward()
    assert trained.model.layers[0].self_attn.k_proj.bias.grad.any()


def test_prefix_and_continuation_of_a_cached_text_agree():
    trained = model(True)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        cache = Cache(SMALL, 2, 12, dtype=torch.bfloat16)
        first = trained(tokens[:, :7], cache=cache)
        rest = trained(tokens[:, 7:], cache=cache)
        whole = trained(tokens)
    assert (torch.cat((first, rest), 1) - whole).norm() < 0.1 * whole.norm()


def test_a_model_in_float32_is_refused():
    with pytest.raises(ConfigError, match=r"starts from a bfloat16 model; this one is torch\.float32"):
        use_float8(LanguageModel(SMALL))


def test_a_model_nothing_of_which_fits_is_refused():
    config = tiny(hidden_size=24, intermediate_size=40)
    with pytest.raises(ConfigError, match="no matrix of this model can be multiplied in FP8: a width of 24"):
        use_float8(LanguageModel(config, dtype=torch.bfloat16))


def test_a_gpu_before_hopper_is_refused(monkeypatch):
    trained = LanguageModel(SMALL, dtype=torch.bfloat16)
    monkeypatch.setattr(LanguageModel, "head_weight", property(lambda self: FakeWeight()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"needs a Hopper GPU \(sm_90\); NVIDIA A100 is sm_80"):
        use_float8(trained)


class FakeWeight:
    dtype, device = torch.bfloat16, torch.device("cuda")
