"""Other people's clients, each in a throw-away environment of its own; skipped where pip cannot install them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benthic.text import Tokenizer
from tests.serve.marked import save_marked

HERE = Path(__file__).parent
KEY = "k" * 32
INSTALL_SECONDS, RUN_SECONDS = 600, 1800
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

pytestmark = pytest.mark.long


@pytest.fixture
def install(tmp_path):
    """Makes an environment with one package in it, and gives the path of its programs."""

    def install(requirement):
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            pytest.skip(f"pip cannot install {requirement}: {(errors or [done.stderr])[-1][:200]}")
        return folder / "bin"

    return install


@pytest.fixture
def address(start, tmp_path):
    """Of a server with drafts, whose model knows marks of thought and calls."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_marked(folder, "V3.1")
    server = start("--speculative", "--num-blocks", "512", model=folder).wait_until_ready()
    yield f"{server.url}/v1"
    server.stop()


def run(*command, folder=None):
    """What a program prints; its last words where it fails."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=RUN_SECONDS, cwd=folder, env=os.environ | QUIET
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_openai_3_with_strict_validation_does_all_that_people_do(address):
    done = json.loads(run(sys.executable, HERE / "openai_script.py", address))
    assert done["version"].startswith("3.")
    assert done["at once"] == 256


def test_openai_2_with_strict_validation_does_all_that_people_do(address, install):
    programs = install("openai==2.54.0")
    done = json.loads(run(programs / "python", HERE / "openai_script.py", address))
    assert done["version"] == "2.54.0"
    assert done["at once"] == 256


def test_litellm_reads_every_answer(address, install):
    # 1.82.7 and 1.82.8 were malware; this one is known good.
    programs = install("litellm==1.105.0")
    done = json.loads(run(programs / "python", HERE / "litellm_script.py", address).splitlines()[-1])
    assert done == {"chat": 8, "bound": 8, "thought": 4, "plain": 4, "errors": 3, "at once": 32}


LETTERS = [
    {"question": f"letter {number} of the alphabet is", "right": chr(97 + number), "wrong": chr(98 + number)}
    for number in range(20)
]
TASK = {
    "task": "letters",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "letters.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{[right, wrong]}}",
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
GENERATION = {
    "task": "spelling",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "letters.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{right}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def test_lm_eval_scores_choices_as_the_engine_does(start, folder, install, tmp_path):
    """local-completions: log-probabilities of an echoed prompt, and greedy texts, of a task that is made here."""
    programs = install("lm_eval[api]==0.4.13")
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LETTERS))
    for task in (TASK, GENERATION):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    server = start(model=folder).wait_until_ready()
    url = f"{server.url}/v1/completions"
    for backend in ("huggingface", "None"):
        out = tmp_path / backend
        model = f"model=tiny,base_url={url},num_concurrent=4,max_retries=1,tokenizer_backend={backend}"
        if backend == "huggingface":
            model += f",tokenizer={folder},tokenized_requests=True"
        tasks = "letters,spelling" if backend == "huggingface" else "spelling"
        command = ("--model", "local-completions", "--model_args", model, "--tasks", tasks, "--include_path", tmp_path)
        run(programs / "lm_eval", *command, "--output_path", out, "--log_samples", folder=tmp_path)
        results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
        assert set(results) == set(tasks.split(","))
    samples = [json.loads(line) for line in next(tmp_path.rglob("samples_letters_*.jsonl")).read_text().splitlines()]
    assert len(samples) == len(LETTERS)
    server.stop()
    assert_scores(samples, folder)


def assert_scores(samples, folder):
    """Each score is the sum of the engine's log-probabilities of the choice's tokens."""
    from benthic.inference.engine import Engine
    from benthic.model.sampling import SamplingParams

    engine, tokenizer = Engine(folder), Tokenizer.from_folder(folder)
    for sample in samples:
        for (prompt, choice), (score, _) in zip(
            [tuple(one.values()) for one in sample["arguments"].values()], sample["filtered_resps"], strict=True
        ):
            context = len(tokenizer.encode(prompt))
            whole = tokenizer.encode(prompt + choice)
            (done,) = engine.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=0))
            wanted = sum(one for one in done.prompt_logprobs[context:] if one is not None)
            assert float(score) == pytest.approx(wanted, abs=1e-3)


def test_schemathesis_finds_no_5xx_and_no_body_outside_its_schema(start, install, tmp_path):
    """At least 5,000 cases of all modes, by all checks, of a server that asks for a key."""
    programs = install("schemathesis==4.32.0")
    folder, keys = tmp_path / "model", tmp_path / "keys"
    folder.mkdir()
    save_marked(folder, "V3.1", positions=128)
    keys.write_text(KEY)
    server = start("--speculative", "--api-key-file", str(keys), model=folder).wait_until_ready()
    said = run(
        *(programs / "schemathesis", "--config-file", HERE / "schemathesis.toml"),
        *("run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--checks", "all"),
        *("--mode", "all", "--max-examples", "800", "--continue-on-failure", "--workers", "4"),
        *("--request-timeout", "600", "--max-response-time", "600", "--seed", "1", "--warnings", "off"),
        folder=tmp_path,
    )
    assert int(re.search(r"(\d+) generated", said)[1]) >= 5000
    assert "No issues found" in said
    server.stop()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert not re.search(r"HTTP.* 5\d\d ", log)
