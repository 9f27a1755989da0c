"""v2-lite and deepseek-v3: the pretraining runs of two published models, as their reports state them.

Text and tokenizer are the reader's: `--data.source`, `--data.path` and `--data.tokenizer` say where they are. Both
pretrain at 4,096 positions without YaRN, which the published configs have from context extension.
"""

from __future__ import annotations

from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig, RopeParameters
from benthic.config.parallel import ParallelConfig
from benthic.config.train import (
    BalanceConfig,
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    MemoryConfig,
    OptimizerConfig,
    Phase,
    PrecisionConfig,
    PredictionConfig,
    Schedule,
    TrainConfig,
)

LENGTH = 4096
TRILLION = 1e12


def v2_lite() -> TrainConfig:
    """DeepSeek-V2-Lite (arXiv:2405.04434, appendix B): 15.7B parameters, 5.7T tokens, softmax router with the
    expert-level loss alone."""
    steps = 302_000  # 4,608 sequences each: 5.7T tokens
    return TrainConfig(
        name="v2-lite",
        model=_pretraining("deepseek-v2-lite"),
        data=_text(),
        steps=steps,
        optimizer=OptimizerConfig(
            learning_rate=Schedule(
                peak=4.2e-4,
                start=0.0,
                phases=(
                    Phase(shape="linear", until=2_000, unit="steps"),
                    Phase(until=0.8 * steps, unit="steps"),
                    Phase(until=0.9 * steps, unit="steps", factor=0.316),
                    Phase(until=steps, unit="steps", factor=0.316**2),
                ),
            )
        ),
        batch=BatchConfig(sequences=4_608, micro_sequences=1),
        balance=BalanceConfig(bias_rule="none", auxiliary_loss="expert", alpha=1e-3),
        evaluation=EvaluationConfig(every=1_000, max_tokens=4_000_000),
        checkpoint=CheckpointConfig(every=1_000, asynchronous=True),
        memory=MemoryConfig(recomputation="up_projections"),
        parallel=ParallelConfig(shard=64, expert=8),
    )


def deepseek_v3() -> TrainConfig:
    """DeepSeek-V3 (arXiv:2412.19437, section 4.2): 671B parameters and one prediction layer, 14.8T tokens, in FP8.

    Over 2,048 GPUs as section 3.2 lays them out: 16 pipeline ranks, experts over 64 ranks (8 nodes), optimiser states
    split over the 128 ranks that read different sequences (ZeRO-1), no tensor parallelism. DualPipe holds the model
    twice; DualPipeV has its bubble and holds it once. The batch begins at 3,072 sequences (section 4.2), 24
    micro-batches of one sequence a rank, where DualPipe and DualPipeV on 16 ranks take 32 or more; the report does not
    say how its first updates ran. Here those up to 4,096 sequences, the first 39 of 14,800 billion tokens, run as
    zero-bubble V on the same stages (`ParallelConfig.schedule_for`), and no size of a batch is changed.
    """
    return TrainConfig(
        name="deepseek-v3",
        model=_pretraining("deepseek-v3").replace(initializer_range=0.006, quantization_config=None),
        data=_text(fim_rate=0.1),
        steps=242_782,
        optimizer=OptimizerConfig(
            learning_rate=Schedule(
                peak=2.2e-4,
                start=0.0,
                phases=(
                    Phase(shape="linear", until=2_000, unit="steps"),
                    Phase(until=10 * TRILLION, unit="tokens"),
                    Phase(shape="cosine", until=14.3 * TRILLION, unit="tokens", factor=0.1),
                    Phase(until=14.633 * TRILLION, unit="tokens", factor=0.1),
                    Phase(until=14.8 * TRILLION, unit="tokens", factor=7.3e-6 / 2.2e-4),
                ),
            )
        ),
        batch=BatchConfig(
            sequences=Schedule(
                peak=15_360, start=0.2, phases=(Phase(shape="linear", until=0.469 * TRILLION, unit="tokens"),)
            ),
            micro_sequences=1,
        ),
        balance=BalanceConfig(
            bias_rule="sign",
            speed=Schedule(
                peak=1e-3,
                phases=(
                    Phase(until=14.3 * TRILLION, unit="tokens"),
                    Phase(until=14.8 * TRILLION, unit="tokens", factor=0.0),
                ),
            ),
        ),
        prediction=PredictionConfig(
            weight=Schedule(
                peak=0.3,
                phases=(
                    Phase(until=10 * TRILLION, unit="tokens"),
                    Phase(until=14.8 * TRILLION, unit="tokens", factor=1 / 3),
                ),
            )
        ),
        evaluation=EvaluationConfig(every=1_000, max_tokens=16_000_000),
        checkpoint=CheckpointConfig(every=500, asynchronous=True, export_weights="fp8"),
        precision=PrecisionConfig(compute="float8", moments="bfloat16"),
        memory=MemoryConfig(recomputation="up_projections"),
        parallel=ParallelConfig(pipeline=16, schedule="dualpipev", shard=128, zero=1, expert=64),
    )


def _pretraining(name: str) -> ModelConfig:
    config = ModelConfig.from_pretrained(name)
    plain = RopeParameters(rope_theta=config.rope_parameters.rope_theta)
    return config.replace(max_position_embeddings=LENGTH, rope_parameters=plain)


def _text(fim_rate: float = 0.0) -> DataConfig:
    return DataConfig(
        source="parquet", path="corpus", tokenizer="tokenizer", sequence_length=LENGTH, fim_rate=fim_rate,
        validation_fraction=1e-3,
    )  # fmt: skip
