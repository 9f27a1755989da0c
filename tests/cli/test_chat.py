"""`benthic chat`: messages in, answers out, in the checkpoint's own format."""

from __future__ import annotations

import io

import pytest

from benthic.cli.main import main
from benthic.inference.engine import Engine
from benthic.inference.pretrained import save_model
from benthic.model.sampling import SamplingParams
from benthic.text import Tokenizer, train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)
    tokenizer = Tokenizer(tokenizer.definition, tokenizer.config, {"default": TEMPLATE})
    config = tiny(**CONFIGS["v3"], vocab_size=tokenizer.vocab_size, dtype="float32", max_position_embeddings=160)
    save_model(randomised(config), path, weights="fp32")
    tokenizer.save(path)
    return path


def chat(folder, typed, monkeypatch, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", str(folder), "--temperature", "0", "--max-tokens", "7", *arguments])


def test_an_answer_follows_from_all_that_was_said_before(folder, monkeypatch, capsys):
    assert chat(folder, "add\nsecond\n", monkeypatch, "--system", "first") == 0
    engine = Engine(folder)
    messages, expected = [{"role": "system", "content": "first"}], []
    for text in ("add", "second"):
        messages.append({"role": "user", "content": text})
        prompt = engine.tokenizer.encode_chat(messages, add_generation_prompt=True)
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=7, temperature=0))
        messages.append({"role": "assistant", "content": done.text})
        expected.append(done.text + "\n")
    assert capsys.readouterr().out == "".join(expected)


def test_new_forgets_and_exit_leaves(folder, monkeypatch, capsys):
    assert chat(folder, "add\n/new\nadd\n/exit\nnever\n", monkeypatch) == 0
    out = capsys.readouterr().out
    half = out[: len(out) // 2]
    assert half
    assert out == half * 2


def test_a_conversation_that_grew_too_long_is_said_and_the_chat_goes_on(folder, monkeypatch, capsys):
    typed = "x" * 200 + "\nadd\n"
    assert chat(folder, typed, monkeypatch) == 0
    shown = capsys.readouterr()
    assert "exceed the model's 160 positions" in shown.err
    assert len(shown.out) > 1


def test_a_folder_without_a_chat_template_is_refused(folder, tmp_path, monkeypatch, capsys):
    for path in folder.iterdir():
        if path.name != "chat_template.jinja":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert chat(tmp_path, "add\n", monkeypatch) == 2
    assert "has no chat template" in capsys.readouterr().err
