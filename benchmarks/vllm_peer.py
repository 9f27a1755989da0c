"""vLLM on the work of a `benthic bench decode` result, beside which its figures are kept.

python -m benchmarks.vllm_peer checkpoint CONFIG FOLDER   writes well-spread random weights for both, on the GPU
benthic bench decode --model FOLDER --device cuda --output RESULT
python -m benchmarks.vllm_peer beside RESULT              in an environment that has vllm

Random weights that vLLM makes up itself (load format dummy) send all tokens of a batch to the same few experts; both
engines read the same folder. An acceptance of drafts is pretended on both sides, on vLLM's by its own switch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benthic.errors import BenthicError, ConfigError
from benthic.files import write_atomic

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}
"""Of vLLM's environment: its engine in this process, without network, without what has to be compiled by nvcc."""


def arguments(workload: dict[str, Any]) -> dict[str, Any]:
    """What vllm.LLM is given for a workload of benchmarks.decode."""
    if not any(Path(workload["model"]).glob("*.safetensors")):
        raise ConfigError(
            f"the result was measured on {workload['model']}, which holds no weights that vLLM could read too",
            hint="write a folder with: python -m benchmarks.vllm_peer checkpoint CONFIG FOLDER",
        )
    if workload["weights"] != "plain" or workload["cache"] != "plain":
        raise ConfigError("vLLM stands beside results with plain weights and a plain cache")
    most = max(workload["batches"])
    given = {
        "model": workload["model"], "dtype": workload["dtype"], "skip_tokenizer_init": True, "max_num_seqs": most,
        "max_model_len": workload["prompt_tokens"] + workload["new_tokens"] + 64, "gpu_memory_utilization": 0.85,
        "seed": 0, "enable_prefix_caching": False,
    }  # fmt: skip
    drafts, acceptance = workload["draft_tokens"], workload["acceptance"]
    if drafts:
        given["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
        if acceptance is not None:
            # Each draft is right with this probability, and counts where all before it were.
            length = sum(acceptance**place for place in range(drafts + 1))
            given["speculative_config"] |= {
                "rejection_sample_method": "synthetic", "synthetic_acceptance_length": length
            }  # fmt: skip
    return given


def measure(workload: dict[str, Any]) -> dict[str, Any]:
    """The same sizes in the same order as benchmarks.decode, timed the same way."""
    if find_spec("vllm") is None:
        raise ConfigError("this Python has no vllm", hint="run it where vllm is installed, or on PYTHONPATH")
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    begun = time.perf_counter()
    import vllm

    engine = vllm.LLM(**arguments(workload))
    startup = time.perf_counter() - begun
    vocabulary, dice = engine.llm_engine.model_config.get_vocab_size(), random.Random(0)

    def seconds(batch: int, new_tokens: int) -> float:
        prompts = [
            {"prompt_token_ids": [dice.randrange(10, vocabulary - 10) for _ in range(workload["prompt_tokens"])]}
            for _ in range(batch)
        ]
        params = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begun

    seconds(max(workload["batches"]), 4)
    rows = []
    for batch in workload["batches"]:
        seconds(batch, 4)
        pairs = [(seconds(batch, 1), seconds(batch, workload["new_tokens"])) for _ in range(workload["repetitions"])]
        rows.append(row(workload, batch, pairs))
    return {"name": "vLLM", "version": metadata.version("vllm"), "startup_seconds": startup, "results": rows}


def row(workload: dict[str, Any], batch: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Figures of one size, named as benchmarks.decode names them, from seconds to the first and to all tokens."""
    prompt, whole = (median(column) for column in zip(*pairs, strict=True))
    decoded = workload["new_tokens"] - 1
    return {
        "batch": batch,
        "prompt_tokens_per_second": batch * workload["prompt_tokens"] / prompt,
        "prompt_ms": prompt * 1e3,
        "ms_per_token": (whole - prompt) / decoded * 1e3,
        "tokens_per_second": batch * decoded / (whole - prompt),
        "seconds": {"prompt": [pair[0] for pair in pairs], "whole": [pair[1] for pair in pairs]},
    }


def checkpoint(config: str, folder: Path) -> None:
    """Write the weights that `benthic bench decode` would have made up for `config`."""
    import torch

    from benchmarks.decode import spread
    from benthic.config import ModelConfig
    from benthic.inference.pretrained import save_model
    from benthic.model import LanguageModel

    model = LanguageModel(ModelConfig.from_pretrained(config), "cuda", torch.bfloat16)
    spread(model)
    save_model(model, folder)


def beside(path: Path) -> None:
    """Measure vLLM on the work of a result, and keep its figures in it."""
    result = json.loads(path.read_text())
    result["peer"] = measure(result["workload"])
    write_atomic(path, json.dumps(result, indent=2) + "\n")


def main() -> None:
    """The two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("checkpoint", help="random weights for both engines")
    writing.add_argument("config", help="preset name, or folder with config.json")
    writing.add_argument("folder", type=Path)
    comparing = commands.add_parser("beside", help="vLLM on the work of a result")
    comparing.add_argument("result", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "checkpoint":
            checkpoint(options.config, options.folder)
        else:
            beside(options.result)
    except BenthicError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
