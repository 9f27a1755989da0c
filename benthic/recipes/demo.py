"""demo: DeepSeek-V3 in miniature, trained on this machine's own Python standard library in about two minutes."""

from __future__ import annotations

from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig
from benthic.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    Phase,
    PredictionConfig,
    SamplingConfig,
    Schedule,
    TrainConfig,
)


def demo() -> TrainConfig:
    """All parts of V3 (query and key-value latents, decoupled rotary key, a dense first layer, shared and routed
    experts in groups, bias balancing, sequence loss, one prediction layer), sized for two cores and four minutes."""
    return TrainConfig(
        name="demo",
        model=ModelConfig.from_pretrained("tiny"),
        data=DataConfig(source="stdlib", vocab_size=4096, sequence_length=128),
        steps=280,
        optimizer=OptimizerConfig(
            learning_rate=Schedule(
                peak=5e-3,
                start=0.0,
                phases=(
                    Phase(shape="linear", until=0.04, factor=1.0),
                    Phase(shape="constant", until=0.6, factor=1.0),
                    Phase(shape="cosine", until=1.0, factor=0.05),
                ),
            )
        ),
        batch=BatchConfig(sequences=16, micro_sequences=16),
        balance=BalanceConfig(speed=Schedule(peak=2e-2)),
        # V3 lowers lambda from 0.3 to 0.1 after 10 of its 14.8 trillion tokens.
        prediction=PredictionConfig(
            weight=Schedule(peak=0.3, phases=(Phase(until=0.68), Phase(until=1.0, factor=1 / 3)))
        ),
        evaluation=EvaluationConfig(every=50, max_tokens=8_192, micro_sequences=16),
        sampling=SamplingConfig(every=100, prompts=("def __init__(self",), max_tokens=48, temperature=0.5),
        checkpoint=CheckpointConfig(every=100),
        logging=LoggingConfig(every=10, routing_every=25),
    )
