"""A training step and cached greedy decoding, beside transformers on the same weights, tokens, dtype and device.

transformers runs its fastest experts (`grouped_mm`) and SDPA, and both sides take the same fused AdamW. transformers
cannot train prediction layers, so the two that are compared leave them out; a third line trains them too.
A benchmark refuses to print while its test is red: logits, loss and the decoded tokens must agree first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.timing import ratio, seconds_in_turn, summary
from benthic.config import ModelConfig
from benthic.config.published import config_to_published, published_model_type
from benthic.config.settings import Settings
from benthic.errors import ConfigError, NumericsError
from benthic.inference.generate import generate
from benthic.model import LanguageModel, initialise
from benthic.model.sampling import SamplingParams
from benthic.numerics.compare import assert_close
from benthic.ops import linear_cross_entropy

CLASSES = {
    "deepseek_v3": "DeepseekV3",
    "deepseek_v2": "DeepseekV2",
    "llama": "Llama",
    "olmo2": "Olmo2",
    "qwen2": "Qwen2",
}


class Workload(Settings):
    """What is measured. `new_tokens` are decoded behind `prompt_tokens`, one sequence at a time."""

    preset: str = "tiny"
    batch: int = Field(8, ge=1)
    sequence_length: int = Field(256, ge=2)
    prompt_tokens: int = Field(256, ge=1)
    new_tokens: int = Field(64, ge=1)
    repetitions: int = Field(7, ge=1)
    threads: int = Field(2, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = 0


def measure(workload: Workload) -> dict[str, Any]:
    """Check, then time in turn; plain data. Raises ConfigError without transformers, NumericsError on disagreement."""
    transformers = _transformers()
    machine = describe(("torch", "transformers"))
    if workload.device == "cpu":
        torch.set_num_threads(workload.threads)
    # A model's end-of-sequence token would end one decoding run earlier than the next.
    config = ModelConfig.from_pretrained(workload.preset).replace(eos_token_id=None)
    ours, theirs = _models(transformers, config, workload)
    stream = torch.Generator().manual_seed(workload.seed)
    tokens = torch.randint(0, config.vocab_size, (workload.batch, workload.sequence_length + 1), generator=stream)
    tokens = tokens.to(workload.device)
    check(ours, theirs, tokens, workload)
    wait = torch.cuda.synchronize if workload.device.startswith("cuda") else (lambda: None)
    decoding = {
        "benthic": lambda: _decode(ours, tokens, workload),
        "transformers": lambda: _decode_theirs(theirs, tokens, workload),
    }
    decode_times = seconds_in_turn(decoding, workload.repetitions, wait)
    step_times = seconds_in_turn(_training_steps(ours, theirs, tokens), workload.repetitions, wait)
    return {
        "name": "train",
        "workload": workload.model_dump(),
        "model": {"layers": config.num_hidden_layers, "parameters": sum(p.numel() for p in theirs.parameters())},
        "machine": machine,
        "training": _compared(step_times, workload.batch * workload.sequence_length),
        "decoding": _compared(decode_times, workload.new_tokens),
    }


def check(ours: LanguageModel, theirs: nn.Module, tokens: Tensor, workload: Workload) -> None:
    """Raise NumericsError unless logits, loss and, in float32, decoded tokens agree."""
    with torch.no_grad():
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        expected = theirs(inputs).logits
        exact = workload.dtype == "float32"
        assert_close(ours(inputs).float(), expected.float(), "model_fp32" if exact else "model_bf16", "logits")
        loss = nn.functional.cross_entropy(expected.flatten(0, 1).float(), labels.flatten())
        hidden = ours.states(inputs).hidden
        summed, count = linear_cross_entropy(hidden.flatten(0, 1), ours.head_weight, labels.flatten())
        assert_close(summed / count, loss, "operation_fp32" if exact else "operation_bf16", "loss")
    if exact and _decode(ours, tokens, workload) != _decode_theirs(theirs, tokens, workload):
        raise NumericsError("greedy decoding of benthic and transformers differs on the same weights")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "transformers is not installed, and this benchmark runs it beside benthic",
            hint="pip install transformers",
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _models(transformers: Any, config: ModelConfig, workload: Workload) -> tuple[LanguageModel, nn.Module]:
    family = published_model_type(config)
    if family not in CLASSES:
        raise ConfigError(f"transformers has no model for preset {workload.preset!r} ({family})")
    dtype = getattr(torch, workload.dtype)
    ours = LanguageModel(config, workload.device, dtype)
    initialise(ours, workload.seed)
    published = getattr(transformers, CLASSES[family] + "Config")(**config_to_published(config))
    theirs = getattr(transformers, CLASSES[family] + "ForCausalLM")._from_config(
        published, dtype=dtype, attn_implementation="sdpa"
    )
    if config.n_routed_experts:
        theirs.set_experts_implementation("grouped_mm")
    known = set(theirs.state_dict())
    theirs.load_state_dict({name: tensor for name, tensor in ours.state_dict().items() if name in known}, strict=False)
    return ours, theirs.to(workload.device)


def _training_steps(ours: LanguageModel, theirs: nn.Module, tokens: Tensor) -> dict[str, Callable[[], object]]:
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    main = ours.config.num_hidden_layers
    predicting = {id(p) for layer in ours.model.layers[main:] for p in layer.parameters()}
    subjects: dict[str, Callable[[], object]] = {
        "benthic": _step(
            ours, [p for p in ours.parameters() if id(p) not in predicting], lambda: _loss(ours, inputs, labels, 0)
        ),
        "transformers": _step(theirs, list(theirs.parameters()), lambda: theirs(inputs, labels=inputs).loss),
    }
    if depth := ours.config.num_nextn_predict_layers:
        subjects["benthic with prediction"] = _step(
            ours, list(ours.parameters()), lambda: _loss(ours, inputs, labels, depth)
        )
    return subjects


def _step(model: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        model.train()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _loss(model: LanguageModel, inputs: Tensor, labels: Tensor, depth: int) -> Tensor:
    states = model.states(inputs, num_predictions=depth)
    total = 0.0
    for k, hidden in enumerate((states.hidden, *states.predictions)):
        summed, _ = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, labels[:, k:].flatten())
        total = total + summed / labels.numel()
    return total


def _decode(model: LanguageModel, tokens: Tensor, workload: Workload) -> list[int]:
    model.eval()
    params = SamplingParams(max_tokens=workload.new_tokens, temperature=0.0)
    return list(generate(model, tokens[0, : workload.prompt_tokens].tolist(), params))


def _decode_theirs(model: Any, tokens: Tensor, workload: Workload) -> list[int]:
    model.eval()
    prompt = tokens[:1, : workload.prompt_tokens]
    length = workload.new_tokens
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        min_new_tokens=length,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def _compared(times: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    return {
        "unit": "tokens/s",
        "speed": summary(times, tokens),
        "times_transformers": ratio(times, "benthic", "transformers"),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """None: what disagrees was never timed."""
    return []


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    workload, machine = result["workload"], result["machine"]
    lines = [
        f"{workload['preset']}: {result['model']['parameters'] / 1e6:.1f}M parameters, {workload['dtype']}, "
        f"{workload['device']}, {workload['threads']} threads; {machine['processor']}, {machine['cores']} cores",
        "logits, loss and greedy tokens agree with transformers",
    ]
    for part, title in (
        ("training", f"training step, {workload['batch']} x {workload['sequence_length']} tokens"),
        ("decoding", f"greedy decoding, {workload['new_tokens']} tokens, batch 1"),
    ):
        lines += ["", f"{title:<44}{'tokens/s':>10}   quartiles"]
        for name, speed in result[part]["speed"].items():
            spread = f"{speed['first_quartile']:.0f} to {speed['third_quartile']:.0f}"
            lines.append(f"  {name:<42}{speed['median']:>10.0f}   {spread}")
        found = result[part]["times_transformers"]
        spread = f"{found['first_quartile']:.2f} to {found['third_quartile']:.2f}"
        lines.append(f"  {'times transformers':<42}{found['median']:>10.2f}   {spread}")
    if machine["load_average_before"] and machine["load_average_before"] > 0.5:
        lines += [
            "",
            f"The machine was busy: {machine['load_average_before']:.1f} other processes ran when this began. "
            "Do not keep these figures.",
        ]
    return "\n".join(lines) + "\n"
