"""Whole runs of the smallest model: what they write, learn, refuse, and how they continue."""

import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benthic.config.model import RopeParameters
from benthic.config.train import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    Phase,
    PrecisionConfig,
    SamplingConfig,
    Schedule,
    TrainConfig,
)
from benthic.errors import CapacityError, ConfigError, NumericsError, RunError
from benthic.log import logger
from benthic.text import Tokenizer
from benthic.train import step
from benthic.train.run import resolved, run
from benthic.train.schedule import planned_tokens
from benthic.train.state import complete_states
from tests.train.small import small_model, small_run

KEYS = "step tokens loss mtp_loss balance_loss lr grad_norm max_violation tokens_per_second mfu memory_gib".split()
TIMES = ("tokens_per_second", "memory_gib")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder):
    """Every tensor of the newest state by file and name, and its numbers."""
    newest = complete_states(folder / "checkpoints")[-1]
    files = {path.stem: load_file(path) for path in newest.glob("*.safetensors")}
    tensors = {f"{stem}/{name}": one for stem, file in files.items() for name, one in file.items()}
    return tensors, json.loads((newest / "state.json").read_text())


def assert_same_end(folder, other):
    (tensors, numbers), (others, other_numbers) = final_state(folder), final_state(other)
    assert numbers == other_numbers
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    timeless = [[{k: v for k, v in row.items() if k not in TIMES} for row in rows(one)] for one in (folder, other)]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return run(small_run(sampling=SamplingConfig(every=6, prompts=("copy",), max_tokens=5)), folder)


def test_a_run_ends_with_a_state_a_model_and_rows(finished):
    assert (finished.step, finished.tokens, finished.interrupted) == (12, 12 * 4 * 16, None)
    training = [row for row in rows(finished.folder) if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 4, 6, 8, 10, 12]
    assert set(KEYS) <= set(training[0])
    validation = [row for row in rows(finished.folder) if "val_loss" in row]
    assert [row["step"] for row in validation] == [5, 10, 12]
    wanted = {"bits_per_byte", "mtp_acceptance", "max_violation_global", "ema_val_loss", "ema_bits_per_byte"}
    assert wanted <= set(validation[0])
    states = [path.name for path in complete_states(finished.folder / "checkpoints")]
    assert states == ["step-00000009", "step-00000012"]
    samples = [json.loads(line) for line in (finished.folder / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [6, 12]


def test_expert_loads_are_kept_by_layer(finished):
    loads = np.load(finished.folder / "routing" / "loads-00000008.npz")
    assert sorted(loads) == ["layer_1", "layer_2"]
    assert loads["layer_1"].sum() == 4 * 16 * 2
    assert loads["layer_2"].sum() == 4 * 15 * 2


def test_the_model_folder_is_published_layout_with_tokenizer_template_and_card(finished):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished.model, dtype=torch.float32)
    assert model.config.model_type == "deepseek_v3"
    stored = load_file(finished.model / "model.safetensors")
    weights, _ = final_state(finished.folder)
    expected = weights["weights/model.layers.1.mlp.experts.down_proj"][3]
    assert torch.equal(stored["model.layers.1.mlp.experts.3.down_proj.weight"], expected.bfloat16())
    bias = stored["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().max() > 0
    assert Tokenizer.from_folder(finished.model).render_chat([{"role": "user", "content": "hi"}])
    card = (finished.model / "README.md").read_text()
    for text in ("procedural text, 40000 bytes", "| bits_per_byte |", "| parameters |", "knows nothing else"):
        assert text in card
    assert "Python Software Foundation" not in card


def test_the_config_in_the_folder_runs_again_to_the_same_end(finished, tmp_path):
    again = TrainConfig.from_yaml(finished.folder / "config.yaml")
    assert again.precision.compute == "float32"
    run(again, tmp_path / "again")
    assert_same_end(finished.folder, tmp_path / "again")


def test_a_run_resumed_at_its_end_changes_nothing(finished):
    before = (finished.folder / "metrics.jsonl").read_bytes(), (finished.model / "model.safetensors").read_bytes()
    config = TrainConfig.from_yaml(finished.folder / "config.yaml")
    again = run(config, finished.folder, resume=True)
    assert again.validation == finished.validation
    after = (finished.folder / "metrics.jsonl").read_bytes(), (finished.model / "model.safetensors").read_bytes()
    assert before == after


def test_steps_below_those_already_made_are_refused(finished):
    config = TrainConfig.from_yaml(finished.folder / "config.yaml")
    with pytest.raises(RunError, match="has made 12 updates already, but steps is 5"):
        run(config.replace(steps=5), finished.folder, resume=True)


def test_a_signal_saves_and_leaves_and_the_run_continues_bit_for_bit(finished, tmp_path, monkeypatch):
    real = step.move_biases

    def interrupting(biases, loads, config, speed):
        real(biases, loads, config, speed)
        if sent and sent.pop():
            os.kill(os.getpid(), signal.SIGTERM)

    sent = [True]
    monkeypatch.setattr(step, "move_biases", interrupting)
    config = TrainConfig.from_yaml(finished.folder / "config.yaml")
    stopped = run(config, tmp_path / "run")
    assert (stopped.step, stopped.interrupted, stopped.model) == (1, signal.SIGTERM, None)
    assert [path.name for path in complete_states(tmp_path / "run" / "checkpoints")] == ["step-00000001"]
    run(config, tmp_path / "run", resume=True)
    assert_same_end(finished.folder, tmp_path / "run")


def test_a_signal_while_the_model_is_written_does_not_hide_the_model(tmp_path, monkeypatch):
    from benthic.train import run as module

    real = module.export

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(module, "export", interrupted)
    summary = run(small_run(steps=2), tmp_path / "run")
    assert (summary.step, summary.interrupted, summary.model) == (2, None, tmp_path / "run" / "model")
    assert (summary.model / "config.json").is_file()


@pytest.mark.parametrize(
    ("stated", "balance", "said"),
    [
        (0.01, {"alpha": 0.001}, True),
        (0.01, {"alpha": 0.01, "auxiliary_loss": "none"}, True),
        (0.001, {"alpha": 0.001}, False),
        (None, {"alpha": 0.001}, False),
        (0.0, {"auxiliary_loss": "none"}, False),
    ],
)
def test_a_recorded_balance_loss_that_does_not_train_is_said_to(stated, balance, said, caplog):
    config = small_run(model=small_model(aux_loss_alpha=stated), balance=balance)
    with caplog.at_level("INFO", logger=logger.name):
        resolved(config)
    assert ("model.aux_loss_alpha" in caplog.text) == said
    if said:
        assert f"balance.alpha {balance['alpha']:g} with" in caplog.text
        assert "is what trains; model.aux_loss_alpha 0.01 is only recorded in config.json" in caplog.text


def test_a_run_outside_the_main_thread_needs_no_signals(tmp_path):
    ends = []
    thread = threading.Thread(target=lambda: ends.append(run(small_run(steps=2), tmp_path / "run")))
    thread.start()
    thread.join()
    assert ends[0].step == 2


@pytest.fixture
def runs_ahead(monkeypatch):
    """Launch the next update before the last one is waited for, as on a GPU."""
    monkeypatch.setattr("benthic.train.run.ASYNCHRONOUS", ("cpu",))


def test_a_run_ahead_of_its_updates_is_the_same_run(tmp_path, runs_ahead):
    ahead, plain = tmp_path / "ahead", tmp_path / "plain"
    run(small_run(), ahead)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("benthic.train.run.ASYNCHRONOUS", ())
        run(small_run(), plain)
    kept = [path.relative_to(plain) for path in plain.rglob("*.safetensors")]
    assert len(kept) > 4
    for name in kept:
        assert (ahead / name).read_bytes() == (plain / name).read_bytes(), name


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_an_update_launched_behind_one_that_fails_changes_nothing(tmp_path, monkeypatch, broken, runs_ahead):
    test_a_value_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(tmp_path, monkeypatch, broken)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_update_and_keeps_the_batch(tmp_path, monkeypatch, broken):
    real = step.losses

    def breaking(model, batch, *rest):
        found = real(model, batch, *rest)
        calls.append(batch)
        if len(calls) == 8:
            if broken == "loss":
                found.total = found.total * float("nan")
            else:
                found.total.register_hook(lambda gradient: gradient * float("inf"))
        return found

    calls = []
    monkeypatch.setattr(step, "losses", breaking)
    with pytest.raises(NumericsError, match="update 4 stopped before changing any weight") as caught:
        run(small_run(), tmp_path / "run")
    folder = tmp_path / "run" / "failures" / "step-00000004"
    assert str(folder) in caught.value.hint
    kept = load_file(folder / "batch.safetensors")
    assert torch.equal(kept["tokens"][2:], calls[7].tokens)
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == 4
    assert report["micro_batches_with_bad_loss"] == ([1] if broken == "loss" else [])
    assert report["parameters_with_bad_gradient"]
    assert report["grad_norm"] in ("nan", "inf")
    monkeypatch.undo()
    # The update was not made, so the run continues from the state before it as if nothing had been.
    run(small_run(), tmp_path / "run", resume=True)


def test_a_validation_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    from benthic.train import trainer

    real = trainer.validate

    def broken(*arguments):
        found = real(*arguments)
        found.nats = float("nan")
        return found

    monkeypatch.setattr(trainer, "validate", broken)
    with pytest.raises(NumericsError, match="the loss on held-out text is nan after update 5"):
        run(small_run(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_full_disk_ends_the_run_with_the_older_state_in_place(tmp_path, monkeypatch):
    from benthic.train import state

    real = state.write_tensors

    def full(path, tensors):
        if "step-00000006" in str(path):
            raise OSError(28, "No space left on device")
        real(path, tensors)

    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(CapacityError, match="no room to write the training state of step 6"):
        run(small_run(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    run(small_run(), tmp_path / "run", resume=True)


def test_a_changed_corpus_is_refused(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 400)
    data = small_run().data.replace(source="folder", path=str(text), vocab_size=280)
    run(small_run(data=data, steps=3), tmp_path / "run")
    (text / "a.txt").write_text("ten nine eight seven six five four three two one\n" * 500)
    with pytest.raises(RunError, match="the corpus has changed since step 3"):
        run(small_run(data=data, steps=6), tmp_path / "run", resume=True)


def test_bfloat16_with_float32_masters_learns(tmp_path):
    config = small_run(precision=PrecisionConfig(compute="bfloat16"), steps=30, optimizer=fast())
    summary = run(config, tmp_path / "run")
    losses = [row["loss"] for row in rows(summary.folder) if "loss" in row]
    assert losses[-1] < losses[0] - 1.0
    weights, _ = final_state(summary.folder)
    master = weights["weights/model.layers.0.mlp.up_proj.weight"]
    assert master.dtype == torch.float32
    assert not torch.equal(master, master.bfloat16().float())


NARROW = {"compute": "bfloat16", "moments": "bfloat16"}


def test_a_bfloat16_run_with_bfloat16_moments_continues_bit_for_bit(tmp_path):
    config = small_run(steps=7, precision=NARROW, memory={"recomputation": "up_projections"})
    run(config, tmp_path / "whole")
    run(config.replace(steps=4), tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    (tensors, numbers), (others, other_numbers) = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    assert numbers["loader"] == other_numbers["loader"] == numbers["loader"] | {"position": 7 * 4}
    assert {one.dtype for name, one in tensors.items() if name.startswith("moments/")} == {torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_a_float8_run_continues_bit_for_bit(tmp_path):
    config = small_run(
        steps=3,
        precision={"compute": "float8", "moments": "bfloat16"},
        evaluation=EvaluationConfig(every=100, final_max_tokens=50),
    )
    run(config, tmp_path / "whole")
    run(config.replace(steps=2), tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    (tensors, _), (others, _) = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def test_recomputation_may_change_on_resume(tmp_path):
    run(small_run(steps=4), tmp_path / "run")
    config = small_run(steps=7, memory={"recomputation": "layer"})
    run(config, tmp_path / "run", resume=True)
    run(small_run(steps=7), tmp_path / "whole")
    (tensors, _), (others, _) = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


def fast():
    return OptimizerConfig(learning_rate=Schedule(peak=1e-2), weight_decay=0.0)


def test_a_small_model_learns_procedural_text(tmp_path):
    """A model that has seen little learns a lot: far below the loss of guessing evenly, ln 320 = 5.77."""
    config = small_run(
        steps=150,
        data=small_run().data.replace(sequence_length=32),
        batch=BatchConfig(sequences=8, micro_sequences=8),
        optimizer=fast(),
        evaluation=EvaluationConfig(every=1000, final_max_tokens=2000, micro_sequences=8),
        checkpoint=CheckpointConfig(every=1000, export_average=False),
        logging=LoggingConfig(every=10, routing_every=1000),
    )
    summary = run(config, tmp_path / "run")
    losses = [row["loss"] for row in rows(summary.folder) if "loss" in row]
    assert losses[0] == pytest.approx(5.77, abs=0.15)
    assert losses[-1] < 3.5
    assert summary.validation["val_loss"] < 3.6
    assert summary.validation["mtp_acceptance"][0] > 0.3


def test_a_growing_batch_reads_the_planned_tokens(tmp_path):
    ramp = Schedule(peak=6, start=1 / 3, phases=(Phase(shape="linear", until=4, unit="steps"),))
    config = small_run(batch=BatchConfig(sequences=ramp, micro_sequences=2), steps=5)
    summary = run(config, tmp_path / "run")
    assert summary.tokens == planned_tokens(config) == (2 + 4 + 4 + 6 + 6) * 16


def test_a_run_may_start_from_another_models_weights_with_longer_context(finished, tmp_path):
    rope = RopeParameters(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0
    )
    config = small_run(
        model=small_model(rope_parameters=rope, max_position_embeddings=128),
        start_from=str(finished.model),
        data=small_run().data.replace(sequence_length=100, tokenizer=str(finished.model)),
        steps=1,
    )
    summary = run(config, tmp_path / "longer")
    first = rows(summary.folder)[0]["loss"]
    assert first < rows(finished.folder)[0]["loss"] - 0.3


def test_weights_of_a_model_that_computes_otherwise_are_refused(finished, tmp_path):
    config = small_run(
        model=small_model(routed_scaling_factor=7.0, rms_norm_eps=1e-2),
        start_from=str(finished.model),
        data=small_run().data.replace(tokenizer=str(finished.model)),
    )
    with pytest.raises(ConfigError, match=r"rms_norm_eps was 1e-06, is 0\.01; routed_scaling_factor was 1\.0, is 7\.0"):
        run(config, tmp_path / "other")


def test_cuda_without_a_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        run(small_run(device="cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
