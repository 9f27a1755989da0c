"""The smallest run that has every part: latents, groups, shared and routed experts, bias, one prediction layer."""

from typing import Any

from benthic.config.data import DataConfig
from benthic.config.model import ModelConfig
from benthic.config.train import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    Phase,
    Schedule,
    TrainConfig,
)


def small_model(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.05,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
    )
    return ModelConfig(**(settings | changes))


def small_run(**changes: Any) -> TrainConfig:
    rate = Schedule(peak=1e-2, start=0.0, phases=(Phase(shape="linear", until=4, unit="steps"),))
    settings: dict[str, Any] = dict(
        name="small",
        model=small_model(),
        data=DataConfig(source="procedural", procedural_bytes=40_000, vocab_size=320, sequence_length=16),
        steps=12,
        device="cpu",
        optimizer=OptimizerConfig(learning_rate=rate, ema_decay=0.9),
        batch=BatchConfig(sequences=4, micro_sequences=2),
        evaluation=EvaluationConfig(every=5, max_tokens=200, final_max_tokens=400, micro_sequences=4),
        checkpoint=CheckpointConfig(every=3, keep=2),
        logging=LoggingConfig(every=2, routing_every=4),
    )
    return TrainConfig(**(settings | changes))
