from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benthic.inference.pretrained import save_model
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny
from tests.serve.reliability.faults import FOLDER, Faults
from tests.serve.reliability.faulty_engine import STEP_SECONDS
from tests.serve.running import RunningServer


class FaultyServer(RunningServer):
    """One whose engine fails as `faults` asks."""

    entry = (str(Path(__file__).with_name("faulty_server.py")),)
    faults: Faults


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory):
    """A model with a prediction layer and room for 8192 tokens."""
    path = tmp_path_factory.mktemp("long")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)
    sizes = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 8192, "eos_token_id": 1}
    save_model(randomised(tiny(**CONFIGS["v3"], dtype="float32", **sizes)), path, weights="fp32")
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def start_faulty(long_folder, tmp_path_factory):
    """Starts servers that can be asked to fail; a step takes `step_seconds` at least."""
    made = []

    def start(*options, step_seconds=0.0):
        place = tmp_path_factory.mktemp("faulty")
        faults = Faults(place / "faults")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(FOLDER, str(faults.folder))
            patch.setenv(STEP_SECONDS, str(step_seconds))
            patch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
            patch.setenv("OMP_NUM_THREADS", "1")
            made.append(FaultyServer(long_folder, *options, log=place / "server.log"))
        made[-1].faults = faults
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def tell(request):
    """Prints figures as one line of JSON; docs/reliability.md is written from them."""

    def tell(**figures):
        print(f"\nFIGURES {request.node.name} {json.dumps(figures)}")

    return tell
