"""Everything in examples/ runs against a running server. litellm's and lm-eval's, where those packages are there."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.test_tools import client as tool_client  # noqa: F401  (a fixture: a server whose template shows tools)

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command):
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.iterdir()} == {
        "openai_client.py",
        "litellm_client.py",
        "curl.sh",
        "lm_eval.sh",
    }


def test_the_openai_client_chats_streams_keeps_a_schema_and_calls_a_tool(tool_client):  # noqa: F811
    lines = run(sys.executable, EXAMPLES / "openai_client.py", tool_client.base_url).splitlines()
    said = dict(line.split(": ", 1) for line in lines if line.startswith(("chat: ", "stream: ", "schema: ", "tool: ")))
    assert set(said) == {"chat", "stream", "schema", "tool"}
    # An untrained model writes white space, and may reach the most tokens before it closes the object.
    assert said["schema"].startswith("{")
    assert said["tool"].startswith("look_up {")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_script_gets_answers_from_each_address(server):
    out = run(EXAMPLES / "curl.sh", server.url)
    _, models, chat, stream, health = (part.split("\n", 1)[1] for part in ("\n" + out).split("# "))
    assert json.loads(models)["data"][0]["id"] == "tiny"
    assert json.loads(chat)["usage"]["completion_tokens"] <= 16
    assert stream.rstrip().endswith("data: [DONE]")
    assert json.loads(health)["status"] == "ok"


@pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="litellm is not installed")
def test_litellm_chats_and_streams(server):
    out = run(sys.executable, EXAMPLES / "litellm_client.py", "tiny", f"{server.url}/v1")
    assert "chat: " in out
    assert "stream: " in out


@pytest.mark.skipif(shutil.which("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_scores_a_task_of_our_own(server, folder, tmp_path):
    (tmp_path / "sums.jsonl").write_text("".join(f'{{"question": "{n}+1", "answer": "{n + 1}"}}\n' for n in range(4)))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}='\n"
        "doc_to_choice: ['1', '2', '3', '4']\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    out = run(EXAMPLES / "lm_eval.sh", folder, "sums", server.url, "--include_path", tmp_path)
    assert "|sums" in out.replace(" ", "")
