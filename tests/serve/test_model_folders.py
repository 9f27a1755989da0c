"""Folders that somebody broke, or made to break in: a clear error, exit code 2, and nothing in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from benthic.errors import BenthicError
from benthic.inference.pretrained import load_model
from benthic.text import Tokenizer
from benthic.text.tokenizer import TEMPLATE_FILE

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
SIZE_BYTES = 8


class Exploit:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def change(path, **values):
    """Set some values of a JSON file; None takes one away."""
    changed = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in changed.items() if value is not None}))


def header_of(path):
    content = path.read_bytes()
    size = int.from_bytes(content[:SIZE_BYTES], "little")
    return json.loads(content[SIZE_BYTES : SIZE_BYTES + size]), content[SIZE_BYTES + size :]


def rewrite(path, change_header):
    header, data = header_of(path)
    change_header(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(SIZE_BYTES, "little") + text + data)


def first(header):
    return next(name for name in header if name != "__metadata__")


def shard(folder, files):
    """An index that says the weights are in `files`; the first has them all."""
    header, _ = header_of(folder / WEIGHTS)
    names = [name for name in header if name != "__metadata__"]
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {name: files[place % len(files)] for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def move(folder, old, new):
    def rename(header):
        header[new] = header.pop(old)

    rewrite(folder / WEIGHTS, rename)


def pickled(path, run):
    path.write_bytes(pickle.dumps(Exploit(run)))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def link(path, target):
    path.unlink()
    path.symlink_to(target)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def head(path, size):
    path.write_bytes(size.to_bytes(SIZE_BYTES, "little") + path.read_bytes()[SIZE_BYTES:])


BROKEN = {
    "no config": lambda folder, run: (folder / CONFIG).unlink(),
    "a config that is not JSON": lambda folder, run: (folder / CONFIG).write_text("{"),
    "a config of another type": lambda folder, run: (folder / CONFIG).write_text("[]"),
    "a config of another architecture": lambda folder, run: change(folder / CONFIG, model_type="gpt2"),
    "a width that is text": lambda folder, run: change(folder / CONFIG, hidden_size="__import__('os')"),
    "a negative width": lambda folder, run: change(folder / CONFIG, hidden_size=-16),
    "an absurd width": lambda folder, run: change(folder / CONFIG, hidden_size=2**40),
    "a dtype that is a function": lambda folder, run: change(folder / CONFIG, dtype="load", torch_dtype=None),
    "a config of other weights": lambda folder, run: change(folder / CONFIG, intermediate_size=21),
    "no weights": lambda folder, run: (folder / WEIGHTS).unlink(),
    "pickled weights alone": lambda folder, run: (
        (folder / WEIGHTS).unlink(),
        pickled(folder / "pytorch_model.bin", run),
    ),
    "a pickle under the name of weights": lambda folder, run: pickled(folder / WEIGHTS, run),
    "truncated weights": lambda folder, run: cut(folder / WEIGHTS, 20_000),
    "a truncated header": lambda folder, run: cut(folder / WEIGHTS, 100),
    "empty weights": lambda folder, run: cut(folder / WEIGHTS, 0),
    "a header of 2^63 bytes": lambda folder, run: head(folder / WEIGHTS, 2**63),
    "a header of 2^64 - 1 bytes": lambda folder, run: head(folder / WEIGHTS, 2**64 - 1),
    "a header of 99 megabytes": lambda folder, run: head(folder / WEIGHTS, 99 * 10**6),
    "a header that is not JSON": lambda folder, run: (folder / WEIGHTS).write_bytes(b"\x08" + b"\x00" * 7 + b"[" * 100),
    "a tensor of another shape": lambda folder, run: rewrite(
        folder / WEIGHTS, lambda header: header[first(header)].update(shape=[1, 2, 3])
    ),
    "a tensor of another dtype": lambda folder, run: rewrite(
        folder / WEIGHTS, lambda header: header[first(header)].update(dtype="OBJECT")
    ),
    "a tensor behind the end": lambda folder, run: rewrite(
        folder / WEIGHTS, lambda header: header[first(header)].update(data_offsets=[2**40, 2**40 + 64])
    ),
    "a tensor of negative size": lambda folder, run: rewrite(
        folder / WEIGHTS, lambda header: header[first(header)].update(data_offsets=[64, 0])
    ),
    "a missing tensor": lambda folder, run: move(folder, "model.norm.weight", "other.weight"),
    "a missing shard": lambda folder, run: shard(
        folder, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    ),
    "a shard outside the folder": lambda folder, run: shard(folder, ["../model.safetensors"]),
    "a shard of an absolute path": lambda folder, run: shard(folder, ["/etc/passwd"]),
    "a link to another file": lambda folder, run: link(folder / WEIGHTS, "/etc/passwd"),
    "a link to itself": lambda folder, run: link(folder / WEIGHTS, folder / WEIGHTS),
    "a link to an endless device": lambda folder, run: link(folder / WEIGHTS, "/dev/zero"),
    "a folder under the name of weights": lambda folder, run: as_folder(folder / WEIGHTS),
    "a pipe under the name of weights": lambda folder, run: as_pipe(folder / WEIGHTS),
    "no tokenizer": lambda folder, run: (folder / TOKENIZER).unlink(),
    "a tokenizer that is not JSON": lambda folder, run: (folder / TOKENIZER).write_text("{"),
    "a tokenizer that is a pickle": lambda folder, run: pickled(folder / TOKENIZER, run),
    "a tokenizer without a vocabulary": lambda folder, run: change(folder / TOKENIZER, model={"type": "BPE"}),
    "a template that does not compile": lambda folder, run: (folder / TEMPLATE_FILE).write_text("{% for %}"),
}


def broken(name: str, folder: Path, path: Path) -> Path:
    copy = path / "model"
    shutil.copytree(folder, copy)
    BROKEN[name](copy, path / "run")
    return copy


def load(folder):
    """As a server does."""
    Tokenizer.from_folder(folder).chat_template()
    load_model(folder)


def test_there_are_twenty_of_them():
    assert len(BROKEN) >= 20


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_a_clear_error_and_nothing_of_it_is_run(folder, tmp_path, name):
    copy = broken(name, folder, tmp_path)
    with pytest.raises(BenthicError) as caught:
        load(copy)
    assert len(caught.value.message) > 20
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", BROKEN)
def test_a_server_of_a_broken_folder_ends_with_code_2_and_one_message(folder, start, tmp_path, name):
    server = start(model=broken(name, folder, tmp_path))
    assert server.process.wait(120) == 2
    said = server.log.read_text()
    assert "error: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_code_beside_a_model_is_not_run(folder, tmp_path):
    """Published configs name code of their authors in auto_map: here it is only a file."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'run')!r})")
    change(
        copy / CONFIG, auto_map={"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "modeling_evil.Config"}
    )
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Tokenizer", None]})
    load(copy)
    assert not (tmp_path / "run").exists()
