"""Imported by torchtitan itself: registers the benchmark's model under its `deepseek_v3`."""

from __future__ import annotations

import os

from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.moe import MoEArgs

from benchmarks.torchtitan_peer import FLAVOUR, MODEL_FILE, model_arguments
from benthic.config.model import ModelConfig

_arguments = model_arguments(ModelConfig.from_pretrained(os.environ[MODEL_FILE]), os.environ["BENTHIC_BENCH_ATTENTION"])
_arguments["moe_args"] = MoEArgs(**_arguments["moe_args"])
deepseekv3_args[FLAVOUR] = DeepSeekV3ModelArgs(**_arguments)
