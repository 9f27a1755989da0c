"""Run folders: one process, one config, rows that end where the state does."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benthic.config.train import BalanceConfig, CheckpointConfig, LoggingConfig, OptimizerConfig, Phase, Schedule
from benthic.errors import DataError, RunError
from benthic.train.folder import RunFolder, refuse_changed_config
from benthic.train.run import run
from tests.train.small import small_model, small_run


def make(path, resume=False, **changes):
    with RunFolder.open(path, small_run(**changes), resume) as folder:
        return folder


def test_a_new_folder_holds_the_whole_config(tmp_path):
    folder = make(tmp_path / "deep" / "run")
    assert type(small_run()).from_yaml(folder.config) == small_run()


def test_a_folder_in_use_is_refused_with_the_way_out(tmp_path):
    make(tmp_path).append("metrics.jsonl", {"step": 1})
    with pytest.raises(RunError, match="is not empty") as caught:
        make(tmp_path)
    assert "--resume" in caught.value.hint
    make(tmp_path, resume=True)


def test_prepared_text_alone_is_no_run(tmp_path):
    (tmp_path / "data").mkdir()
    make(tmp_path)


def test_nothing_to_resume_is_an_error_and_makes_no_folder(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        make(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benthic.train.folder import RunFolder;"
        "from tests.train.small import small_run\n"
        f"with RunFolder.open(Path({str(tmp_path)!r}), small_run(), False): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"in use by process {holder.pid}"):
            make(tmp_path, resume=True)
        # Killed, it lets go at once: a lock cannot be left behind.
        holder.kill()
        holder.wait()
    make(tmp_path, resume=True)


def test_settings_that_change_the_weights_are_named_when_a_run_is_resumed(tmp_path):
    make(tmp_path)
    changed = {"model": small_model(hidden_size=64), "optimizer": OptimizerConfig(weight_decay=0.2), "seed": 1}
    with pytest.raises(RunError, match="cannot resume with a changed config") as caught:
        make(tmp_path, resume=True, **changed)
    assert "model.hidden_size was 32, is 64" in caught.value.message
    assert "optimizer.weight_decay was 0.1, is 0.2" in caught.value.message
    assert "seed was 0, is 1" in caught.value.message
    assert type(small_run()).from_yaml(tmp_path / "config.yaml") == small_run()


def test_settings_that_touch_no_weight_may_change():
    refuse_changed_config(
        small_run(), small_run(name="other", checkpoint=CheckpointConfig(every=7), logging=LoggingConfig(every=1))
    )


def test_steps_may_change_unless_a_schedule_counts_in_shares_of_them():
    refuse_changed_config(small_run(), small_run(steps=99))
    shares = BalanceConfig(speed=Schedule(peak=1.0, phases=(Phase(until=0.9),)))
    with pytest.raises(RunError, match="steps was 12, is 99"):
        refuse_changed_config(small_run(balance=shares), small_run(balance=shares, steps=99))


def test_rows_after_the_state_are_dropped_and_so_is_one_cut_short(tmp_path):
    folder = make(tmp_path)
    for step in (1, 2, 3):
        folder.append("metrics.jsonl", {"step": step, "loss": 0.5})
        (folder.routing / f"loads-{step:08d}.npz").touch()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    folder.rewind(2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert sorted(path.name for path in folder.routing.iterdir()) == ["loads-00000001.npz", "loads-00000002.npz"]


def test_a_folder_that_may_not_be_written_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(self, *arguments, **settings):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="not allowed to write the run folder") as caught:
        make(tmp_path / "run")
    assert "--run-folder" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{broken\n", r"line 2 is no row of a run \(JSONDecodeError"),
        (b"[1]\n", r"line 2 is no row of a run \(TypeError"),
        (b'{"loss": 1}\n', r"line 2 is no row of a run \(KeyError: 'step'"),
        (b"\xff\xfe\n", r"line 2 is no row of a run \(UnicodeDecodeError"),
    ],
)
def test_a_damaged_row_is_named_and_nothing_is_dropped(tmp_path, row, message):
    folder = make(tmp_path)
    (folder.routing / "loads-mine.npz").touch()
    content = b'{"step": 1}\n' + row + b'{"step": 9}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=message) as caught:
        folder.rewind(2)
    assert "mend or remove that line" in caught.value.hint
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n')
    folder.rewind(0)
    assert (folder.routing / "loads-mine.npz").exists()


def test_a_start_that_failed_on_its_corpus_does_not_block_the_next(tmp_path):
    folder = tmp_path / "run"
    empty = tmp_path / "corpus"
    empty.mkdir()
    config = small_run()
    wrong = config.replace(data=config.data.replace(source="folder", path=str(empty)))
    with pytest.raises(DataError):
        run(wrong, folder)
    assert run(config, folder).model is not None
    with pytest.raises(RunError, match="is not empty"):
        run(config, folder)
