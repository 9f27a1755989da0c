"""Cut off anywhere, a save leaves the old checkpoint or the new one, never a mixture."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from benthic.checkpoint import load_into, open_checkpoint, write_checkpoint
from benthic.checkpoint.folder import INCOMING
from benthic.checkpoint.staging import staged
from benthic.errors import CheckpointError
from tests.checkpoint.folders import TINY, Bag, random_tensors


def first_seed(folder):
    """Which seed's weights the folder holds."""
    checkpoint = open_checkpoint(folder)
    bag = Bag(checkpoint.config)
    load_into(bag, checkpoint)
    state = bag.state_dict()
    for seed in range(3):
        if all(torch.equal(state[name], tensor) for name, tensor in random_tensors(TINY, seed).items()):
            return seed
    raise AssertionError("a mixture of checkpoints")


class Killed(BaseException):
    """Stands for a process that ends here: nothing that runs after it may count."""


@pytest.mark.parametrize(("old", "new"), [(300_000, 10**9), (10**9, 300_000), (250_000, 350_000), (10**9, 10**9)])
def test_a_save_cut_off_while_moving_files_is_finished_by_the_next(tmp_path, monkeypatch, old, new):
    folder = tmp_path / "model"
    write_checkpoint(random_tensors(TINY, 1), TINY, folder, "fp32", max_shard_bytes=old)
    rename, move, unlink = os.rename, os.replace, os.unlink
    for survived in range(60):
        steps = 0

        def step(function):
            def cut(*arguments, **options):
                nonlocal steps
                steps += 1
                if steps > survived:  # noqa: B023
                    raise Killed
                return function(*arguments, **options)

            return cut

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", step(rename))
            patch.setattr(os, "replace", step(move))
            patch.setattr(os, "unlink", step(unlink))
            patch.setattr("shutil.rmtree", lambda *arguments, **options: None)
            try:
                write_checkpoint(random_tensors(TINY, 2), TINY, folder, "fp32", max_shard_bytes=new)
            except Killed:
                pass
            else:
                break
        if (folder / INCOMING).exists():
            with pytest.raises(CheckpointError, match="between two checkpoints") as caught:
                open_checkpoint(folder)
            assert f"mv {folder}/.incoming/* {folder}/" in str(caught.value)
        else:
            assert first_seed(folder) == 1
        for path in folder.glob(".model.partial*"):
            rename(path, tmp_path / f"leftover-{survived}")
        write_checkpoint(random_tensors(TINY, 1), TINY, folder, "fp32", max_shard_bytes=old)
        assert first_seed(folder) == 1
    assert first_seed(folder) == 2
    assert survived > 2


KILLED_WHILE_WRITING = """
import os, signal, sys
from benthic.checkpoint import shard, write_checkpoint
from tests.checkpoint.folders import TINY, random_tensors

original, count = shard.ShardWriter.write, 0
def write(self, name, tensor):
    global count
    count += 1
    if count > 40:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, name, tensor)
shard.ShardWriter.write = write
write_checkpoint(random_tensors(TINY, 2), TINY, sys.argv[1], "fp32")
"""


def test_a_process_killed_while_writing_leaves_the_old_checkpoint_and_its_waste_is_removed(tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(random_tensors(TINY, 1), TINY, folder, "fp32")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(folder)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert list(folder.glob(".model.partial*"))
    assert first_seed(folder) == 1
    write_checkpoint(random_tensors(TINY, 2), TINY, folder, "fp32")
    assert first_seed(folder) == 2
    assert not list(folder.glob(".*"))


def test_waste_is_known_by_its_lock_and_not_by_the_process_that_left_it(tmp_path):
    with staged(tmp_path / "model", 0) as stage:
        (stage / "waste").write_text("half")
        left = tmp_path / stage.name.replace(stage.name[-8:], "00000000")
        left.mkdir()
        # Beside a save that is still writing, in this very process: the waste goes, the other save's folder stays.
        with staged(tmp_path / "model", 0) as other:
            (other / "config.json").write_text("second")
            assert stage.is_dir()
            assert not left.exists()
        (stage / "waste").unlink()
        shutil.rmtree(tmp_path / "model")
    assert not list(tmp_path.glob(".*"))
