"""`benthic chat --url` with `benthic serve`: the same talk as without a server, and Ctrl-C ends an answer there."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

from benthic.cli.main import main
from benthic.inference.engine import Engine
from benthic.model.sampling import SamplingParams


def test_the_answers_are_the_engine_s(server, folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("add\nsecond\n"))
    assert main(["chat", "--url", server.url, "--temperature", "0", "--max-tokens", "7"]) == 0
    engine = Engine(folder)
    messages, expected = [], []
    for text in ("add", "second"):
        messages.append({"role": "user", "content": text})
        prompt = engine.tokenizer.encode_chat(messages, add_generation_prompt=True)
        (done,) = engine.generate([prompt], SamplingParams(max_tokens=7, temperature=0))
        messages.append({"role": "assistant", "content": done.text})
        expected.append(done.text + "\n")
    assert capsys.readouterr().out == "".join(expected)


def test_an_interrupt_cancels_the_answer_and_the_talk_goes_on(server):
    code = "from benthic.cli.main import run; run()"
    command = [sys.executable, "-c", code, "chat", "--url", server.url, "--min-tokens", "1900", "--temperature", "0"]
    before = server.metric("vllm:request_success_total")
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    chat.stdin.write("add\n")
    chat.stdin.flush()
    assert chat.stdout.read(1)  # the answer began
    chat.send_signal(signal.SIGINT)
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:request_success_total") == before + 1
    out, err = chat.communicate("/exit\n", timeout=30)
    assert chat.returncode == 0, err
    assert out.endswith("\n")
