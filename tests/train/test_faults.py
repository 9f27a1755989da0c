"""Ranks that fail: the others stop soon, one says why, torchrun begins again, and nothing is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benthic.config.parallel import ParallelConfig
from benthic.config.train import BatchConfig, CheckpointConfig, EvaluationConfig, LoggingConfig, TrainConfig
from benthic.errors import BenthicError, NumericsError, PeerError
from benthic.train.run import run
from tests.parallel.processes import on_ranks
from tests.train.small import small_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 60
"""Within which a run with a dead rank must have ended or begun again."""


def a_run(**changes) -> TrainConfig:
    settings = dict(
        steps=30,
        evaluation=EvaluationConfig(every=1000, max_tokens=100, final_max_tokens=100),
        checkpoint=CheckpointConfig(every=2, keep=2, asynchronous=True),
        logging=LoggingConfig(every=1),
        parallel=ParallelConfig(shard=2, expert=2),
    )
    return small_run(**(settings | changes))


@contextmanager
def torchrun(config: TrainConfig, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(config.parallel.world), *options]
    command += ["-m", "benthic", "train", str(recipe), "--run-folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()


def process_of_rank(rank: int, folder: Path) -> int:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in command and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"no process of rank {rank}")


def wait_for_state(folder: Path, process: subprocess.Popen) -> None:
    ends = time.monotonic() + SECONDS
    while not list(folder.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize("layout", ["fsdp=2,ep=2", "pp=2"])
def test_a_run_whose_rank_is_killed_says_so_begins_again_and_ends_as_if_nothing_had_been(tmp_path, layout):
    folder, layout = tmp_path / "killed", ParallelConfig.parse(layout)
    with torchrun(a_run(parallel=layout), folder, "--max-restarts", "1") as process:
        wait_for_state(folder, process)
        os.kill(process_of_rank(1, folder), signal.SIGKILL)
        killed = time.monotonic()
        out, told = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, told
    assert time.monotonic() - killed < SECONDS
    assert len(re.findall("rank 1 of the run ended without a word .*; rank 0 noticed", told)) == 1, told
    assert "goes on from the last saved state" in told
    assert out.strip() == str(folder / "model")
    on_ranks(2, run, a_run(parallel=layout), tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert losses(folder) == losses(tmp_path / "whole")


KILLS = 10


def newest_state(folder: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")
@pytest.mark.parametrize(("layout", "asynchronous"), [("fsdp=2,ep=2", False), ("fsdp=4,ep=2", True)])
def test_a_run_whose_ranks_are_killed_ten_times_ends_as_if_nothing_had_been(tmp_path, layout, asynchronous):
    """Each life saves after every update, so that about every other kill falls into a save."""
    saving = CheckpointConfig(every=1, keep=2, asynchronous=asynchronous)
    layout = ParallelConfig.parse(layout)
    config = a_run(steps=80, batch=BatchConfig(sequences=4, micro_sequences=1), checkpoint=saving, parallel=layout)
    folder, moments = tmp_path / "killed", random.Random(0)
    with torchrun(config, folder, "--max-restarts", str(KILLS)) as process:
        for _ in range(KILLS):
            before, ends = newest_state(folder), time.monotonic() + SECONDS
            while newest_state(folder) <= before:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < ends, f"no state after step {before}"
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.15))
            os.kill(process_of_rank(moments.randrange(layout.world), folder), signal.SIGKILL)
        _, told = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, told
    assert not list((folder / "checkpoints").glob(".*")), "a save that was interrupted has left something"
    on_ranks(layout.world, run, config.replace(checkpoint=CheckpointConfig(every=80)), tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert losses(folder) == losses(tmp_path / "whole")


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] if "loss" in row else row["val_loss"] for row in rows]


@pytest.mark.parametrize("told", ["rank 1", "torchrun"])
def test_sigterm_saves_on_all_ranks_and_leaves(tmp_path, told):
    folder = tmp_path / "stopped"
    with torchrun(a_run(steps=100_000, checkpoint=CheckpointConfig(every=5)), folder) as process:
        wait_for_state(folder, process)
        os.kill(process.pid if told == "torchrun" else process_of_rank(1, folder), signal.SIGTERM)
        _, log = process.communicate(timeout=SECONDS)
    found = re.search(r"SIGTERM: saved step (\d+); continue with --resume", log)
    assert found, log
    assert (folder / "checkpoints" / f"step-{int(found[1]):08d}" / "state.json").is_file()


def poisoned(config: TrainConfig, folder: Path) -> str:
    """Rank 1 reads one embedding that is not a number."""
    from benthic.train import trainer

    class Poisoned(trainer.Trainer):
        def make_update(self, display, ahead):
            if self.step == 2 and self.world.rank == 1:
                with torch.no_grad():
                    self.optimizer.masters["model.norm.weight"][0] = float("nan")
            super().make_update(display, ahead)

    from benthic.train import run as runs

    runs.Trainer = Poisoned
    try:
        run(config, folder)
    except (NumericsError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("layout", ["fsdp=2,ep=2", "pp=2", "tp=2"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(tmp_path, layout):
    told = on_ranks(2, poisoned, a_run(parallel=ParallelConfig.parse(layout)), tmp_path / "run")
    assert sorted(text.split(":")[0] for text in told) == ["NumericsError", "PeerError"]
    assert "update 3 stopped before changing any weight" in told[0]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 2
    assert list((tmp_path / "run" / "failures").iterdir())
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").is_file()  # begun before, finished


def refused(config: TrainConfig, folder: Path, there: Path) -> str:
    """What a rank raises; rank 1 is given another folder."""
    try:
        run(config, there if os.environ["RANK"] == "1" else folder)
    except BenthicError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_run_folder_that_rank_0_cannot_use_is_its_word_alone(tmp_path):
    (tmp_path / "letter").write_text("something of the user's")
    told = on_ranks(2, refused, a_run(), tmp_path, tmp_path)
    assert told[0].startswith(f"RunError: run folder {tmp_path} is not empty (it holds letter)")
    assert told[1] == f"PeerError: rank 0 could not use the run folder {tmp_path}"


def test_a_run_folder_that_not_all_ranks_see_is_refused(tmp_path):
    told = on_ranks(2, refused, a_run(), tmp_path / "here", tmp_path / "there")
    assert told[0].startswith("PeerError")
    assert told[1] == (
        f"RunError: rank 1 does not see the run folder that rank 0 made at {tmp_path / 'there'}\n"
        "hint: --run-folder must lie on a file system that all hosts see: each rank writes its part there"
    )
