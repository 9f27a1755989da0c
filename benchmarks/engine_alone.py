"""`python -m benchmarks.engine_alone FOLDER SETTINGS`: an engine in this process, without a server.

A line of JSON asks for answers (prompts of token ids, new_tokens); a line tells the seconds and tokens that they took.
"""

from __future__ import annotations

import json
import sys
import time

from benthic.config.engine import EngineConfig
from benthic.inference.engine import Engine
from benthic.model.sampling import SamplingParams


def main(folder: str, settings: str) -> None:
    """Answer lines until the input ends."""
    engine = Engine(folder, settings=EngineConfig(**json.loads(settings)))
    print(json.dumps({"vocabulary": engine.model.config.vocab_size}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(max_tokens=asked["new_tokens"], temperature=0, ignore_eos=True)
        began, tokens = time.perf_counter(), 0
        for prompt in asked["prompts"]:
            engine.add_request(prompt, params)
        while engine.has_work:
            tokens += sum(len(event.token_ids) for event in engine.step())
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
