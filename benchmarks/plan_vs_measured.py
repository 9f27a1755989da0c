"""Predicted against measured: memory and time of real training steps on one GPU.

    python -m benchmarks.plan_vs_measured [--settings NAME ...] [--steps 5] [--output FILE]
    python -m benchmarks.plan_vs_measured --again FILE

Each setting makes updates of benthic.train.step as the trainer does, on random tokens; in the first ten the routing
biases spread the load. Memory is compared with torch.cuda.max_memory_allocated. Time is predicted twice: from the
device file, and from rates of single kernels measured in this run at the setting's shapes (kernel_rates.py), never from
the step. An update whose loss or gradient is not finite ends the benchmark.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.kernel_rates import with_measured_rates
from benchmarks.machine import describe
from benchmarks.train_arm import fill, timed_steps
from benchmarks.train_arms import model_config
from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig
from benthic.config.train import (
    BalanceConfig,
    BatchConfig,
    MemoryConfig,
    OptimizerConfig,
    PrecisionConfig,
    Schedule,
    TrainConfig,
)
from benthic.data import Batch
from benthic.model.language_model import LanguageModel
from benthic.plan.activations import element_bytes, layer_activations
from benthic.plan.devices import DEVICES, Device, Rate, find_device
from benthic.plan.memory import TrainingMemory, training_memory
from benthic.plan.training import Training
from benthic.plan.training_time import StepTime, step_time
from benthic.train.optimizer import Optimizer
from benthic.train.recomputation import recompute
from benthic.train.schedule import Place
from benthic.train.step import Launched, Update, finish, launch

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10
COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8"}


@dataclass(frozen=True)
class Setting:
    """One model and what it is trained with."""

    model: ModelConfig
    training: Training


def settings() -> dict[str, Setting]:
    """Sizes, batches, precisions and recomputation that put the highest moment at different places. Those of V2-Lite's
    widths are the training benchmark's model; the README shows the first."""
    lite = model_config("lite")
    wide = ModelConfig.from_pretrained("deepseek-v3").replace(
        num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16, n_group=1, topk_group=1, vocab_size=32768
    )
    dense = ModelConfig.from_pretrained("olmo2-7b").replace(num_hidden_layers=8)
    bf16 = Training(4096, 4, bf16_moments=True)
    fp8 = replace(bf16, precision="fp8")
    return {
        "v2-lite, 8 layers, 4 x 4096, bf16": Setting(lite, bf16),
        "v2-lite, 8 layers, 4 x 4096, float8": Setting(lite, fp8),
        "v2-lite, float32 moments, 4 x 4096, bf16": Setting(lite, replace(bf16, bf16_moments=False)),
        "v2-lite, up-projections recomputed, 4 x 4096, bf16": Setting(
            lite, replace(bf16, recomputation="up_projections")
        ),
        "v2-lite, up-projections recomputed, 4 x 4096, float8": Setting(
            lite, replace(fp8, recomputation="up_projections")
        ),
        "v2-lite, layers recomputed, 8 x 4096, bf16": Setting(
            lite, replace(bf16, micro_batch=8, recomputation="layer")
        ),
        "v2-lite, layers recomputed, 8 x 4096, float8": Setting(
            lite, replace(fp8, micro_batch=8, recomputation="layer")
        ),
        "v2-lite, 4 micro-batches, 1 x 2048, bf16": Setting(lite, Training(2048, 1, 4, bf16_moments=True)),
        "v3 widths, 2 layers + MTP, bf16, 2 x 4096": Setting(wide, replace(bf16, micro_batch=2)),
        "v3 widths, 2 layers + MTP, float8, 2 x 4096": Setting(wide, replace(fp8, micro_batch=2)),
        "olmo2-7b, 8 layers, bf16, 4 x 4096": Setting(dense, bf16),
    }


def train_config(setting: Setting, steps: int) -> TrainConfig:
    """The run whose updates are measured. Biases move fast, so that the warm-up evens the loads out."""
    training = setting.training
    return TrainConfig(
        name="plan-vs-measured",
        model=setting.model,
        data=DataConfig(source="procedural", vocab_size=264, sequence_length=training.sequence_length),
        steps=WARM_UP + steps + 2,
        optimizer=OptimizerConfig(learning_rate=Schedule(peak=1e-4)),
        batch=BatchConfig(
            sequences=Schedule(peak=training.micro_batch * training.micro_batches), micro_sequences=training.micro_batch
        ),
        balance=BalanceConfig(speed=Schedule(peak=1e-2)),
        precision=PrecisionConfig(
            compute=COMPUTE[training.precision], moments="bfloat16" if training.bf16_moments else "float32"
        ),
        memory=MemoryConfig(recomputation=training.recomputation),
    )


def build(config: TrainConfig) -> LanguageModel:
    """The model as the trainer makes it, filled on the GPU."""
    dtype = torch.float32 if config.precision.compute == "float32" else torch.bfloat16
    model = LanguageModel(config.model, device="cuda", dtype=dtype)
    fill(model, config.seed)
    if config.precision.compute == "float8":
        from benthic.model.float8 import use_float8

        use_float8(model)
    recompute(model, config.memory.recomputation)
    return model


def make_step(config: TrainConfig) -> Callable[[], Update]:
    """A function that makes the next update, launched before the last is waited for, as the trainer's are."""
    model = build(config)
    optimizer = Optimizer(model, config.optimizer, config.precision.moments)
    stream = torch.Generator().manual_seed(config.seed)
    shape = (int(config.batch.sequences.peak), config.data.sequence_length + 1)
    ahead: Launched | None = None
    failures = Path(tempfile.gettempdir()) / "benthic-bench-failures"

    def started(number: int, before: Launched | None) -> Launched:
        tokens = torch.randint(config.model.vocab_size, shape, generator=stream)
        place = Place(number, (number - 1) * shape[0] * (shape[1] - 1), config.steps)
        return launch(model, optimizer, Batch(tokens, torch.zeros_like(tokens)), place, config, before)

    def step() -> Update:
        nonlocal ahead
        current = ahead or started(1, None)
        ahead = started(current.place.step + 1, current)
        return finish(current, failures)

    return step


def measure(setting: Setting, steps: int) -> dict:
    """Highest allocated bytes and seconds a step, after the warm-up."""
    step = make_step(train_config(setting, steps))
    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed_steps(step, steps, "cuda")
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "step_seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
    }


def this_device() -> Device:
    """The device file's entry for this GPU."""
    name = torch.cuda.get_device_name().lower()
    found = [device for key, device in DEVICES.items() if key in name]
    if not found:
        sys.exit(f"no device in benthic.plan.devices for {name!r}; there are {', '.join(DEVICES)}")
    return found[0]


def kept_ratio(setting: Setting) -> float:
    """Predicted over counted bytes that autograd keeps of a small model on this GPU, with its own kernels."""
    precision = setting.training.precision
    small = setting.model.replace(num_hidden_layers=2, first_k_dense_replace=1, vocab_size=1024)
    if small.n_routed_experts:
        small = small.replace(n_routed_experts=8, n_group=1, topk_group=1)
    model = build(train_config(Setting(small, Training(256, 2, precision=precision)), 1))
    tokens = torch.zeros(2, 256, dtype=torch.int64, device="cuda")
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # Detached: an output that its own operation keeps would hold that operation, and both would stay for good.
        return tensor.detach()

    depths = small.num_nextn_predict_layers
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.states(tokens, num_predictions=depths)
    rotations = model._rotations.rows(0, tokens.shape[1], tokens.device)
    others = (*model.parameters(), *model.buffers(), tokens, rotations)
    fixed = {tensor.untyped_storage().data_ptr() for tensor in others}
    counted = sum(size for pointer, size in storages.items() if pointer not in fixed)
    layers = range(small.num_hidden_layers + depths)
    per_token = sum(one.bytes for layer in layers for one in layer_activations(small, layer, precision, "none"))
    del states, model
    clear()
    return (per_token + element_bytes(precision) * small.hidden_size + 4) * tokens.numel() / counted


def compare(name: str, setting: Setting, device: Device, steps: int) -> dict:
    """One row: predictions, measurement, ratios; or why it was left out."""
    memory = training_memory(setting.model, setting.training)
    row = {"setting": name, "predicted_bytes": round(memory.allocated), "moment": memory.moment}
    if memory.total > torch.cuda.get_device_properties(0).total_memory:
        return row | {"left_out": f"predicted {memory.total / 2**30:.1f} GiB, more than this GPU has"}
    rated = with_measured_rates(device, setting.model, setting.training)
    clear()
    filed_step = step_time(setting.model, setting.training, device)
    rated_step = step_time(setting.model, setting.training, rated)
    try:
        measured = measure(setting, steps)
    except torch.OutOfMemoryError as error:
        return row | {"left_out": f"out of memory: {error}"}
    finally:
        clear()
    return row | _ratios(memory, filed_step, rated_step, rated, measured)


def _ratios(memory: TrainingMemory, filed: StepTime, rated: StepTime, device: Device, measured: dict) -> dict:
    seconds = measured["step_seconds"]["median"]
    return {
        "measured": measured,
        "memory_ratio": memory.allocated / measured["allocated_bytes"],
        "memory_by_part": {part: round(size) for part, size in memory.by_part.items()},
        "predicted_seconds_from_device_file": filed.total,
        "predicted_seconds_from_rates_measured_here": rated.total,
        "time_ratio_from_device_file": filed.total / seconds,
        "time_ratio_from_rates_measured_here": rated.total / seconds,
        "seconds_by_part": {f"{term.part}: {term.name}": term.value for term in rated.lines},
        "rates_tera": {" ".join(key): rate.value / 1e12 for key, rate in device.measured.items()},
        "bandwidth_tera": {"copy": device.memory_bandwidth.value / 1e12}
        | {kind: rate.value / 1e12 for kind, rate in device.measured_bandwidth.items()},
        "launch_microseconds": device.launch_seconds.value * 1e6,
        "tokens_per_second": rated.tokens / seconds,
        "model_tflops": rated.flops / seconds / 1e12,
    }


def predict_again(path: Path) -> None:
    """Rewrite a result with the planner's and the device file's predictions of today beside what was measured then."""
    result, known = json.loads(path.read_text(encoding="utf-8")), settings()
    device = find_device(result["device"])
    for row in result["rows"]:
        if row["setting"] not in known:
            sys.exit(f"{path} has a setting this program does not know: {row['setting']}")
        setting = known[row["setting"]]
        memory = training_memory(setting.model, setting.training)
        row |= {"predicted_bytes": round(memory.allocated), "moment": memory.moment}
        if "measured" not in row:
            continue
        rated = replace(
            device,
            measured=_rates({tuple(key.split()): value for key, value in row["rates_tera"].items()}),
            memory_bandwidth=Rate(row["bandwidth_tera"]["copy"] * 1e12, "that run"),
            measured_bandwidth=_rates({key: value for key, value in row["bandwidth_tera"].items() if key != "copy"}),
            launch_seconds=Rate(row["launch_microseconds"] / 1e6, "that run"),
        )
        filed_step, rated_step = (step_time(setting.model, setting.training, one) for one in (device, rated))
        row |= _ratios(memory, filed_step, rated_step, rated, row["measured"])
        print(show(row))
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _rates(tera: dict) -> dict:
    return {key: Rate(value * 1e12, "that run") for key, value in tera.items()}


def clear() -> None:
    """Give back what the last setting held."""
    gc.collect()
    torch.cuda.empty_cache()


def show(row: dict) -> str:
    """One line of the table."""
    if "left_out" in row:
        return f"{row['setting']:58} left out: {row['left_out'][:90]}"
    measured = row["measured"]
    return (
        f"{row['setting']:58} {row['predicted_bytes'] / 2**30:7.2f} {measured['allocated_bytes'] / 2**30:7.2f} GiB "
        f"{row['memory_ratio']:6.3f}   {row['predicted_seconds_from_device_file']:7.4f} "
        f"{row['predicted_seconds_from_rates_measured_here']:7.4f} {measured['step_seconds']['median']:7.4f} s "
        f"{row['time_ratio_from_device_file']:6.3f} {row['time_ratio_from_rates_measured_here']:6.3f}   "
        f"at {row['moment']}"
    )


def main() -> None:
    known = settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", choices=list(known), default=list(known), metavar="NAME")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--again", type=Path, metavar="FILE", help="predict again what this result measured; no GPU")
    arguments = parser.parse_args()
    if arguments.again:
        return predict_again(arguments.again)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")
    device = this_device()
    result = {
        "name": "plan_vs_measured",
        "machine": describe(("torch", "triton"))
        | {
            "gpu": torch.cuda.get_device_name(),
            "command": "python -m benchmarks.plan_vs_measured " + " ".join(sys.argv[1:]),
        },
        "device": device.name,
        "steps": arguments.steps,
        "kept_bytes_ratio": {name: kept_ratio(known[name]) for name in arguments.settings},
        "rows": [],
    }
    for name, ratio in result["kept_bytes_ratio"].items():
        print(f"{name:58} bytes kept between forward and backward, predicted / counted: {ratio:.3f}")
    output = arguments.output or ROOT / "benchmarks" / "results" / "plan_vs_measured.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'':58} memory: predicted, measured, ratio   time: device file, rates measured here, measured, two ratios")
    for name in arguments.settings:
        row = compare(name, known[name], device, arguments.steps)
        result["rows"].append(row)
        print(show(row), flush=True)
        # After every setting: a run that is cut off leaves what it had measured.
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
