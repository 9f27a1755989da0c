"""The engine's process, with places that fail when faults.py is asked to."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benthic.inference import drawing, runner
from benthic.inference.drawing import Drawn
from benthic.inference.form import Form
from benthic.inference.runner import Runner
from benthic.serve import engine_process
from benthic.text import Detokenizer
from tests.serve.reliability.faults import due, pause, raises

STEP_SECONDS = "BENTHIC_TEST_STEP_SECONDS"
"""How long a step takes at least: as on a GPU, the processor is free meanwhile."""


def patch() -> None:
    """Put the places in."""
    compute, logits, draw = Runner.compute, Runner.logits, drawing.draw
    step_seconds = float(os.environ.get(STEP_SECONDS, "0"))

    def faulty_compute(self: Runner, works: Any) -> runner.Computed:
        began = time.monotonic()
        pause("sleep")
        if due("exit") is not None:
            os._exit(9)
        if due("memory") is not None:
            raise torch.OutOfMemoryError("injected: out of memory")
        if due("device") is not None:
            raise torch.AcceleratorError("injected: an illegal memory access was encountered")
        done = compute(self, works)
        time.sleep(max(0.0, step_seconds - (time.monotonic() - began)))
        return done

    def faulty_logits(self: Runner, hidden: torch.Tensor) -> torch.Tensor:
        return logits(self, hidden) * (1.0 if due("numbers") is None else torch.nan)

    def faulty_draw(*arguments: Any) -> list[Drawn]:
        drawn = draw(*arguments)
        token = due("token")
        return drawn if token is None else [one._replace(token=int(token)) for one in drawn]

    Runner.compute = raises("forward", faulty_compute)
    Runner.logits = faulty_logits
    drawing.draw = raises("sampler", faulty_draw)
    Form._mask = raises("grammar", Form._mask)
    Detokenizer.add = raises("detokeniser", Detokenizer.add)


if __name__ == "__main__":
    patch()
    sys.exit(engine_process.main(int(sys.argv[1])))
