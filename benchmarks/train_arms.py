"""What a training step is measured on: two models, and the ways to train each on one GPU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig
from benthic.config.settings import Settings
from benthic.config.train import BalanceConfig, BatchConfig, OptimizerConfig, PrecisionConfig, Schedule, TrainConfig
from benthic.plan.training import Training

ModelName = Literal["lite", "v3", "tiny"]
Trainer = Literal["benthic", "torchtitan", "transformers"]


class Arm(Settings):
    """One way to train one model, measured in a process of its own.

    Of torchtitan and transformers, `states` bfloat16 means that weights, gradients and moments are all bfloat16;
    float32 is mixed precision. benthic always keeps float32 masters, and `states` is its moments' dtype.
    """

    trainer: Trainer = "benthic"
    model: ModelName = "lite"
    compute: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    states: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    """Whether torch.compile works on each layer (benthic); torchtitan always compiles model and loss."""
    attention: Literal["flex", "sdpa"] = "flex"
    """torchtitan's: flex attention is its model's own choice, sdpa takes cuDNN's kernel."""
    batch: int = Field(4, ge=1)
    sequence_length: int = Field(4096, ge=2)
    warm_up: int = Field(10, ge=1)
    """Updates before timing, in which routing biases spread the tokens over the experts."""
    steps: int = Field(20, ge=2)
    seed: int = 0


ARMS: dict[str, Arm] = {
    "bf16": Arm(),
    "bf16-moments": Arm(states="bfloat16"),
    "float8": Arm(compute="float8", states="bfloat16"),
    "bf16-compiled": Arm(compiled=True),
    "v3-bf16": Arm(model="v3", states="bfloat16", batch=8),
    "v3-float8": Arm(model="v3", compute="float8", states="bfloat16", batch=8),
    "torchtitan": Arm(trainer="torchtitan"),
    "torchtitan-bf16": Arm(trainer="torchtitan", states="bfloat16"),
    "torchtitan-sdpa": Arm(trainer="torchtitan", attention="sdpa"),
    "torchtitan-sdpa-bf16": Arm(trainer="torchtitan", states="bfloat16", attention="sdpa"),
    "v3-torchtitan": Arm(trainer="torchtitan", model="v3"),
    "v3-torchtitan-bf16": Arm(trainer="torchtitan", model="v3", states="bfloat16"),
    "transformers": Arm(trainer="transformers", states="bfloat16"),
}
DEFAULT_ARMS = (
    "bf16", "bf16-moments", "float8", "v3-bf16", "v3-float8", "torchtitan", "torchtitan-bf16", "transformers",
)  # fmt: skip
"""What `benthic bench train` runs on a GPU when no arms are named; the peers where they are installed."""


def model_config(name: ModelName) -> ModelConfig:
    """lite: DeepSeek-V2-Lite's sizes, 8 layers, V3's router (4.59 B parameters, 5.74 GFLOP a token at 4,096).

    v3: three of DeepSeek-V3's expert layers with 32 experts each, and a vocabulary in the same proportion to the
    layers as V3's (129,280 rows for 61 layers). Trained on 8 x 4,096 tokens an update, about what one GPU of V3's run
    got (15,360 sequences over 2,048 GPUs): an update's fixed cost then weighs as it did there.
    """
    sigmoid = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    if name == "lite":
        return ModelConfig.from_pretrained("deepseek-v2-lite").replace(num_hidden_layers=8, **sigmoid)
    if name == "v3":
        return ModelConfig.from_pretrained("deepseek-v3").replace(
            num_hidden_layers=3,
            first_k_dense_replace=0,
            num_nextn_predict_layers=0,
            n_routed_experts=32,
            n_group=1,
            topk_group=1,
            vocab_size=6400,
        )
    return ModelConfig.from_pretrained("tiny")


def train_config(arm: Arm) -> TrainConfig:
    """The run whose updates are timed.

    Biases move fast, so that the warm-up's few updates even the loads out, and weights slowly: of random tokens a model
    learns within a few updates to tell none apart, and then sends them all to the same experts.
    """
    return TrainConfig(
        name="bench",
        model=model_config(arm.model),
        data=DataConfig(source="procedural", vocab_size=264, sequence_length=arm.sequence_length),
        steps=arm.warm_up + arm.steps,
        seed=arm.seed,
        optimizer=OptimizerConfig(learning_rate=Schedule(peak=2.2e-6)),
        batch=BatchConfig(sequences=Schedule(peak=arm.batch), micro_sequences=arm.batch),
        balance=BalanceConfig(speed=Schedule(peak=1e-2)),
        precision=PrecisionConfig(compute=arm.compute, moments=arm.states),
    )


def planned(arm: Arm) -> Training:
    """The same for the planner."""
    precision = {"float32": "fp32", "bfloat16": "bf16", "float8": "fp8"}[arm.compute]
    return Training(arm.sequence_length, arm.batch, precision=precision, bf16_moments=arm.states == "bfloat16")
