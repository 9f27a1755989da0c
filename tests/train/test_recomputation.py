"""Recomputation changes what is kept, and no gradient by a bit."""

from __future__ import annotations

import weakref

import pytest
import torch

from benthic.config.train import BalanceConfig
from benthic.data import Batch
from benthic.model.attention import Span
from benthic.model.float8 import use_float8
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel
from benthic.ops import recomputation
from benthic.plan.activations import layer_activations
from benthic.train.loss import Scale, losses
from benthic.train.recomputation import recompute
from tests.train.small import small_model

KINDS = ("none", "up_projections", "layer")
MODELS = {"latent": {}, "no query latent": {"q_lora_rank": None}, "halves": {"rope_interleave": False}}


def build(kind, compute="float32", **changes):
    model = LanguageModel(small_model(**changes), dtype=torch.float32 if compute == "float32" else torch.bfloat16)
    initialise(model, 0)
    if compute == "float8":
        use_float8(model)
    recompute(model, kind)
    return model


def batch(sequences=3, length=16):
    tokens = torch.randint(0, 320, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens, torch.zeros_like(tokens))


def step(model):
    one = batch()
    found = losses(model, one, Scale(one.tokens[:, 1:].numel(), len(one.tokens)), False, 0.3, BalanceConfig())
    found.total.backward()
    return found


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", [*MODELS])
def test_losses_loads_and_gradients_are_the_same_bit_for_bit(name, kind, compute):
    plain, again = build("none", compute, **MODELS[name]), build(kind, compute, **MODELS[name])
    expected, found = step(plain), step(again)
    assert torch.equal(found.total, expected.total)
    assert {layer: load.tolist() for layer, load in found.loads.items()} == {
        layer: load.tolist() for layer, load in expected.loads.items()
    }
    gradients = {key: one.grad for key, one in again.named_parameters()}
    for key, parameter in plain.named_parameters():
        assert torch.equal(gradients[key], parameter.grad), key


# With values as wide as keys, or a processor's attention keeps copies that it has filled up.
AS_WIDE = {"v_head_dim": 16}


def kept_bytes(kind, monkeypatch, layer=1):
    """Bytes of the distinct storages that a layer leaves for its backward pass, parameters and rotations aside."""
    model = build(kind, **AS_WIDE)
    rotations = model._rotations.rows(0, 16, torch.device("cpu"))
    fixed = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers(), rotations)}
    found = {}

    def seen(tensor):
        if tensor.untyped_storage().data_ptr() not in fixed:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    real = recomputation._Memory.pack

    def pack(memory, tensor):
        packed = real(memory, tensor)
        return packed if isinstance(packed, recomputation._View) else seen(packed)

    monkeypatch.setattr(recomputation._Memory, "pack", pack)
    hidden = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        kept_alive = model.model.layers[layer](hidden, Span(rotations))
    monkeypatch.undo()
    del kept_alive
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_what_is_dropped_is_what_the_planner_says(monkeypatch):
    planned = {kind: layer_activations(small_model(**AS_WIDE), 1, "fp32", kind) for kind in KINDS}
    names = {one.name for one in planned["up_projections"]}
    # A norm's 1 / rms stays, 4 bytes a token; a processor's experts make their products again in any case.
    dropped = [one for one in planned["none"] if one.name not in names and "1 / rms" not in one.name]
    dropped = sum(one.bytes for one in dropped if "routed" not in one.name)
    tokens = 3 * 16
    everything = kept_bytes("none", monkeypatch)
    assert everything - kept_bytes("up_projections", monkeypatch) == tokens * dropped
    assert kept_bytes("layer", monkeypatch) == tokens * sum(one.bytes for one in planned["layer"])


def test_a_backward_pass_frees_what_it_has_made_again():
    results = []
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()

    @recomputation.cheap
    def doubled(one):
        result = one * 2
        results.append(weakref.ref(result))
        return result

    with recomputation.dropping_cheap_results():
        out = doubled(x * 1).square() + doubled(x * 3)[1:].square().sum()
    assert [result() is None for result in results] == [True, True]
    out.sum().backward()
    assert len(results) == 4
    assert all(result() is None for result in results)
    assert torch.allclose(x.grad, 8 * x + 15 * 72 * x * torch.tensor([0.0, 1, 1, 1, 1])[:, None])


def test_without_gradients_nothing_is_remembered():
    plain, again = build("none"), build("up_projections")
    ids = batch().tokens
    with torch.no_grad():
        assert torch.equal(plain(ids), again(ids))
