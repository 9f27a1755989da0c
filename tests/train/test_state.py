"""States on disk: whole or absent, the newest kept, damage named, a full disk harmless."""

import errno
import json
import resource
import signal

import pytest
import torch

from benthic.errors import CapacityError, CheckpointError, RunError
from benthic.train import disk
from benthic.train.disk import PARTIAL, REPLACED, sweep
from benthic.train.state import Progress, State, complete_states, read_state, save_state

CPU = torch.device("cpu")


def state(step, size=8):
    weights = {"a": torch.full((size,), float(step)), "b": torch.arange(3.0)}
    return State(
        progress=Progress(step=step, tokens=10 * step, loader={"position": step}, best={"val_loss": 2.5}, corpus="abc"),
        weights=weights,
        moments={"exp_avg.a": torch.ones(size)},
        average=None,
    )


def test_what_is_saved_is_read_back_generators_included(tmp_path):
    torch.manual_seed(5)
    save_state(tmp_path, state(3), keep=2)
    expected = torch.rand(4)
    torch.manual_seed(6)
    found = read_state(complete_states(tmp_path)[-1], CPU)
    assert found.progress == state(3).progress
    assert torch.equal(found.weights["a"], state(3).weights["a"])
    assert torch.equal(found.moments["exp_avg.a"], torch.ones(8))
    assert found.average is None
    assert torch.equal(torch.rand(4), expected)


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100, 200):
        save_state(tmp_path, state(step), keep=2)
    assert [path.name for path in complete_states(tmp_path)] == ["step-00000100", "step-00000200"]
    save_state(tmp_path, state(300), keep=None)
    assert len(complete_states(tmp_path)) == 3


def test_a_folder_left_half_written_is_not_a_state_and_is_swept(tmp_path):
    save_state(tmp_path, state(1), keep=None)
    half = tmp_path / f".step-00000002{PARTIAL}"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    assert [path.name for path in complete_states(tmp_path)] == ["step-00000001"]
    (tmp_path / ".state.json.123.tmp").touch()
    assert sweep(tmp_path) == [".state.json.123.tmp", half.name]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def fill_with(text):
    return lambda folder: (folder / "text").write_text(text)


class Killed(BaseException):
    """The process ends here, and nothing cleans up after it."""


@pytest.mark.parametrize("last", [1, 2])
def test_a_folder_is_whole_whenever_its_replacement_is_killed(tmp_path, monkeypatch, last):
    """After each rename of publishing: the old one aside, then the new one in place."""
    disk.publish_folder(tmp_path / "model", "a model", fill_with("old"))
    real, renames = disk.os.replace, []

    def until(source, target):
        if len(renames) == last:
            raise Killed
        renames.append(target)
        real(source, target)

    monkeypatch.setattr(disk.os, "replace", until)
    monkeypatch.setattr(disk.shutil, "rmtree", lambda *arguments, **options: None)
    with pytest.raises(Killed):
        disk.publish_folder(tmp_path / "model", "a model", fill_with("new"))
    monkeypatch.undo()
    assert (tmp_path / f".model{REPLACED}").exists()
    assert (tmp_path / "model").exists() == (last == 2)
    assert disk.put_back(tmp_path) == (["model"] if last == 1 else [])
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "text").read_text() == ("old" if last == 1 else "new")


def test_a_sweep_alone_keeps_what_was_moved_aside_and_a_write_after_it_finds_it(tmp_path):
    (tmp_path / f".model{REPLACED}").mkdir()
    assert sweep(tmp_path) == []

    def refuse(folder):
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(CapacityError):
        disk.publish_folder(tmp_path / "model", "a model", refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_replacement_that_is_refused_its_name_leaves_the_old_folder(tmp_path, monkeypatch):
    disk.publish_folder(tmp_path / "model", "a model", fill_with("old"))
    real = disk.os.replace

    def refuse_partial(source, target):
        if str(source).endswith(PARTIAL):
            raise OSError(errno.EIO, "refused")
        real(source, target)

    monkeypatch.setattr(disk.os, "replace", refuse_partial)
    with pytest.raises(RunError, match="cannot write a model"):
        disk.publish_folder(tmp_path / "model", "a model", fill_with("new"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "text").read_text() == "old"


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, name):
    folder = save_state(tmp_path, state(1), keep=None)
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(CheckpointError, match=name) as caught:
        read_state(folder, CPU)
    assert "--resume then continues from the state before it" in caught.value.hint


def test_another_format_is_refused(tmp_path):
    folder = save_state(tmp_path, state(1), keep=None)
    numbers = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(numbers | {"format": 99}))
    with pytest.raises(CheckpointError, match="another format than 1"):
        read_state(folder, CPU)


def test_a_full_disk_keeps_older_states_and_says_so(tmp_path):
    """The limit on file size makes the system itself refuse, half-way through a file."""
    save_state(tmp_path, state(1), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CapacityError, match="no room to write the training state of step 2") as caught:
            save_state(tmp_path, state(2, size=100_000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "everything saved before is intact" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_state(tmp_path / "step-00000001", CPU).progress.step == 1


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOSPC, CapacityError, "no room to write"),
        (errno.EROFS, RunError, "not allowed to write"),
        (errno.EIO, RunError, "cannot write"),
    ],
)
def test_a_rename_that_is_refused_leaves_nothing_behind(tmp_path, monkeypatch, code, kind, message):
    def refuse(source, target):
        raise OSError(code, "refused")

    monkeypatch.setattr(disk.os, "replace", refuse)
    with pytest.raises(kind, match=message):
        disk.publish_folder(tmp_path / "final", "a thing", lambda folder: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ("null", "'NoneType' object"),
        ('{"format": 1, "step": "x"}', "step is 'x'"),
        ('{"format": 1, "unheard_of": 1}', "unheard_of"),
        ('{"format": 1, "loader": {"position": "x"}}', "loader.position is 'x'"),
    ],
)
def test_numbers_of_other_types_are_damage_with_a_way_out(tmp_path, numbers, reason):
    folder = save_state(tmp_path, state(3), keep=2)
    (folder / "state.json").write_text(numbers)
    with pytest.raises(CheckpointError, match=r"cannot read .*state\.json: .*" + reason) as caught:
        read_state(folder, CPU)
    assert "--resume then continues from the state before it" in caught.value.hint


def test_a_random_file_without_generators_is_damage(tmp_path):
    folder = save_state(tmp_path, state(3), keep=2)
    (folder / "weights.safetensors").rename(folder / "random.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*random\.safetensors: 'cpu'"):
        read_state(folder, CPU)


def test_a_folder_without_a_step_number_is_no_state(tmp_path):
    saved = save_state(tmp_path, state(3), keep=2)
    (tmp_path / "step-mine").mkdir()
    assert complete_states(tmp_path) == [saved]
