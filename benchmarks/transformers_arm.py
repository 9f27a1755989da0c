"""transformers' DeepSeek-V3 on the same model, batch and GPU: its grouped experts, SDPA, every state in bf16."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.train_arms import Arm, model_config, train_config
from benthic.config.published import config_to_published


def measure(arm: Arm) -> dict[str, Any]:
    """Time full updates: forward with its own loss, backward, clip, fused AdamW."""
    import transformers

    from benchmarks.train_arm import GIB, arm_result, random_batches, timed_steps

    transformers.logging.set_verbosity_error()
    published = transformers.DeepseekV3Config(**config_to_published(model_config(arm.model)))
    with torch.device("cuda"):
        model = transformers.DeepseekV3ForCausalLM._from_config(
            published, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.set_experts_implementation("grouped_mm")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = random_batches(train_config(arm))

    def step() -> torch.Tensor:
        tokens = next(batches).tokens[:, :-1].contiguous().cuda()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for _ in range(arm.warm_up):
        step()
    torch.cuda.reset_peak_memory_stats()
    seconds, loss = timed_steps(step, arm.steps, "cuda")
    return arm_result(arm, seconds) | {
        "loss": float(loss),
        "version": transformers.__version__,
        "memory": {
            "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        },
    }
