"""kill -9 at random moments, between updates and in the middle of a save: the run ends with the same weights."""

import multiprocessing
import random
import time

import pytest

from benthic.config.train import BatchConfig, CheckpointConfig, EvaluationConfig, LoggingConfig
from benthic.train.run import run
from benthic.train.state import complete_states
from tests.train.small import small_run
from tests.train.test_run import assert_same_end

KILLS = 20
STEPS = 150


def train(folder, resume):
    """More updates than twenty lives make, each followed by a save, so that about every other kill falls into one."""
    config = small_run(
        steps=STEPS,
        batch=BatchConfig(sequences=1, micro_sequences=1),
        evaluation=EvaluationConfig(every=50, max_tokens=100, final_max_tokens=100),
        checkpoint=CheckpointConfig(every=1, keep=2),
        logging=LoggingConfig(every=5, routing_every=10),
    )
    run(config, folder, resume)


def newest(folder):
    states = complete_states(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    return int(states[-1].name.removeprefix("step-")) if states else 0


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_if_it_had_not_been(tmp_path):
    # The server has imported torch once; what it forks starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benthic.train.run", "tests.train.small", "tests.train.test_run"])
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(folder, resume):
        process = context.Process(target=train, args=(folder, resume))
        process.start()
        return process

    def end(process):
        process.join()
        assert process.exitcode == 0

    end(start(whole, False))
    moments = random.Random(0)
    for _ in range(KILLS):
        process = start(killed, (killed / "config.yaml").exists())
        goal = newest(killed) + moments.randrange(3)
        while newest(killed) < goal and process.is_alive():
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        assert process.is_alive(), f"ended by itself with {process.exitcode} at step {newest(killed)}"
        process.kill()
        process.join()
    assert 0 < newest(killed) < STEPS
    end(start(killed, True))
    assert_same_end(whole, killed)
