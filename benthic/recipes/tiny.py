"""tiny: every part of DeepSeek-V3 at the size of a test. Seconds on one core, on text the project writes itself."""

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
    Schedule,
    TrainConfig,
)


def tiny() -> TrainConfig:
    """The demo's model on procedural text, for under a minute: a look at every part of a run."""
    return TrainConfig(
        name="tiny",
        model=ModelConfig.from_pretrained("tiny"),
        data=DataConfig(source="procedural", sequence_length=128),
        steps=200,
        optimizer=OptimizerConfig(
            learning_rate=Schedule(
                peak=4e-3,
                start=0.0,
                phases=(
                    Phase(shape="linear", until=0.05, factor=1.0),
                    Phase(shape="constant", until=0.6, factor=1.0),
                    Phase(shape="cosine", until=1.0, factor=0.1),
                ),
            )
        ),
        batch=BatchConfig(sequences=8, micro_sequences=8),
        balance=BalanceConfig(speed=Schedule(peak=2e-2)),
        evaluation=EvaluationConfig(every=100, max_tokens=20_000, micro_sequences=8),
        checkpoint=CheckpointConfig(every=100),
        logging=LoggingConfig(every=10, routing_every=50),
    )
