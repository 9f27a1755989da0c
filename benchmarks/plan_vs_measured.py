"""Predicted against measured: memory and time of real training steps on one GPU.

    python benchmarks/plan_vs_measured.py [--settings NAME ...] [--steps 5] [--output FILE]
    python benchmarks/plan_vs_measured.py --again FILE

Each setting trains a real LanguageModel with the real optimiser on random tokens. Memory is compared with
torch.cuda.max_memory_allocated. Time is predicted twice: from the device file, and from rates of single kernels
measured in this run at the setting's shapes (kernel_rates.py), never from the step.
A step whose gradient is not finite ends the benchmark.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernel_rates import with_measured_rates  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benthic.config.model import ModelConfig  # noqa: E402
from benthic.config.train import BalanceConfig, OptimizerConfig  # noqa: E402
from benthic.data.loader import Batch  # noqa: E402
from benthic.errors import NumericsError  # noqa: E402
from benthic.model import LanguageModel  # noqa: E402
from benthic.plan.activations import layer_activations  # noqa: E402
from benthic.plan.devices import DEVICES, Device, Rate, find_device  # noqa: E402
from benthic.plan.memory import TrainingMemory, training_memory  # noqa: E402
from benthic.plan.training import Training  # noqa: E402
from benthic.plan.training_time import StepTime, step_time  # noqa: E402
from benthic.train.loss import Scale, losses  # noqa: E402
from benthic.train.optimizer import Optimizer, joint_norm  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """One model and what it is trained with."""

    model: ModelConfig
    training: Training


def settings() -> dict[str, Setting]:
    """Sizes, batches and recomputation that put the highest moment at different places."""
    lite = ModelConfig.from_pretrained("deepseek-v2-lite")
    wide = ModelConfig.from_pretrained("deepseek-v3").replace(
        num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16, n_group=1, topk_group=1, vocab_size=32768
    )
    dense = ModelConfig.from_pretrained("olmo2-7b")
    return {
        "v2-lite, 4 layers, 4 x 4096": Setting(lite.replace(num_hidden_layers=4), Training(4096, 4)),
        "v2-lite, 8 layers, 4 x 4096": Setting(lite.replace(num_hidden_layers=8), Training(4096, 4)),
        "v2-lite, 8 layers, 8 x 4096, layers recomputed": Setting(
            lite.replace(num_hidden_layers=8), Training(4096, 8, recomputation="layer")
        ),
        "v2-lite, 6 layers, 1 x 2048, 4 micro-batches": Setting(
            lite.replace(num_hidden_layers=6), Training(2048, 1, micro_batches=4)
        ),
        "v3 widths, 2 layers + MTP, 2 x 4096": Setting(wide, Training(4096, 2)),
        "v3 widths, 2 layers + MTP, 4 x 4096, layers recomputed": Setting(
            wide, Training(4096, 4, recomputation="layer")
        ),
        "olmo2-7b, 8 layers, 4 x 4096": Setting(dense.replace(num_hidden_layers=8), Training(4096, 4)),
    }


def build(setting: Setting) -> tuple[LanguageModel, Optimizer]:
    """Model and optimiser on the GPU, filled there: drawing billions of numbers on a processor takes minutes."""
    model = LanguageModel(setting.model, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=0.02)
    if setting.training.recomputation == "layer":
        for layer in model.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model, Optimizer(model, OptimizerConfig())


def step(model: LanguageModel, optimizer: Optimizer, batch: Batch, training: Training) -> None:
    """One update, as train/step.py takes it."""
    optimizer.zero_gradients()
    scale = Scale(batch.tokens[:, 1:].numel(), len(batch.tokens))
    for start in range(0, len(batch.tokens), training.micro_batch):
        rows = slice(start, start + training.micro_batch)
        micro = Batch(batch.tokens[rows], batch.documents[rows])
        losses(model, micro, scale, False, 0.3, BalanceConfig()).total.backward()
    norm = joint_norm(optimizer.gradient_norms())
    if not math.isfinite(norm):
        raise NumericsError(f"the gradient's norm is {float(norm)}; nothing is measured on a step that is wrong")
    optimizer.step(1e-4, norm)


def measure(setting: Setting, steps: int) -> dict:
    """Highest allocated bytes and seconds a step, after two steps of warm-up."""
    training = setting.training
    model, optimizer = build(setting)
    stream = torch.Generator(device="cuda").manual_seed(0)
    shape = (training.micro_batch * training.micro_batches, training.sequence_length + 1)
    tokens = torch.randint(setting.model.vocab_size, shape, generator=stream, device="cuda")
    batch = Batch(tokens, torch.zeros_like(tokens))
    for _ in range(2):
        step(model, optimizer, batch, training)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(model, optimizer, batch, training)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
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


def kept_ratio(config: ModelConfig) -> float:
    """Predicted over counted bytes that autograd keeps of a small model on this GPU, with its own kernels."""
    small = config.replace(num_hidden_layers=2, first_k_dense_replace=1, vocab_size=1024)
    if config.n_routed_experts:
        small = small.replace(n_routed_experts=8, n_group=1, topk_group=1)
    training = Training(256, 2)
    model, _ = build(Setting(small, training))
    tokens = torch.zeros(training.micro_batch, training.sequence_length, dtype=torch.int64, device="cuda")
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        # Detached: an output that its own operation keeps would hold that operation, and both would stay for good.
        return tensor.detach()

    depths = small.num_nextn_predict_layers
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model.states(tokens, num_predictions=depths)
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), tokens)}
    # Router weights in float32 and rotations do not grow with tokens.
    counted = sum(size for pointer, size in storages.items() if pointer not in fixed and size % tokens.numel() == 0)
    layers = range(small.num_hidden_layers + depths)
    per_token = sum(one.bytes for layer in layers for one in layer_activations(small, layer, "bf16", "none"))
    del states, model
    clear()
    return (per_token + 2 * small.hidden_size + 4) * tokens.numel() / counted


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
        | {"gpu": torch.cuda.get_device_name(), "command": "python " + " ".join(sys.argv)},
        "device": device.name,
        "steps": arguments.steps,
        "kept_bytes_ratio": {name: kept_ratio(known[name].model) for name in arguments.settings},
        "rows": [],
    }
    for name, ratio in result["kept_bytes_ratio"].items():
        print(f"{name:58} bytes kept between forward and backward, predicted / counted: {ratio:.3f}")
    output = arguments.output or ROOT / "benchmarks" / "results" / f"plan_vs_measured_{device.name}.json"
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
