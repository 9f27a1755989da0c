"""`benthic serve` whose engine is faulty_engine.py, and whose own part of an answer can fail too."""

from __future__ import annotations

from pathlib import Path

from benthic.cli.main import run
from benthic.serve import completions, engine_client
from tests.serve.reliability.faults import raises

if __name__ == "__main__":
    engine_client.ENGINE = (str(Path(__file__).with_name("faulty_engine.py")),)
    completions._Job._piece = raises("writer", completions._Job._piece)
    run()
