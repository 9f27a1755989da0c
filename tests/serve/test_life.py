"""How a server begins and ends, and what it does when its engine dies."""

from __future__ import annotations

import os
import signal
import threading
import time

import openai
import pytest

from benthic.cli.main import main
from tests.serve.running import free_port, is_alive

HELLO = [{"role": "user", "content": "def add"}]
KEY, OTHER_KEY = "k" * 32, "o" * 32


def client_of(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def read_in_background(server, max_tokens):
    """A stream read by a thread, once it began; the thread, and what it reads."""
    read, began = [], threading.Event()

    def read_all():
        with client_of(server) as client:
            try:
                options = {"model": "tiny", "prompt": "def", "max_tokens": max_tokens, "stream": True}
                for chunk in client.completions.create(**options, extra_body={"ignore_eos": True}):
                    read.append(chunk.choices[0].finish_reason)
                    began.set()
            except openai.APIError as error:
                read.append(error)
            except Exception as error:
                read.append(error)

    thread = threading.Thread(target=read_all)
    thread.start()
    assert began.wait(60)
    return thread, read


def test_while_loading_the_server_says_so_and_then_tells_what_it_chose(start):
    server = start()
    server.wait_for(lambda: server.health()[0])
    assert server.health()[0] == 503
    assert server.health()[1]["status"] == "loading"
    with client_of(server) as client, pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert caught.value.code == "engine_loading"
    assert caught.value.response.headers["retry-after"] == "2"
    server.wait_until_ready()
    text = server.log.read_text()
    for line in ("weights ", "cache    ", "context  at most 2048 tokens, by the model's positions", "drafts   none: "):
        assert line in text
    server.stop()


def test_a_first_sigterm_lets_answers_end_and_leaves_no_child(start):
    server = start().wait_until_ready()
    thread, read = read_in_background(server, 500)
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    server.wait_for(lambda: server.health()[1].get("status") == "draining")
    with client_of(server) as client, pytest.raises(openai.InternalServerError, match="about to stop"):
        client.completions.create(model="tiny", prompt="x")
    thread.join(60)
    assert read[-1] == "length"
    assert len(read) > 300
    assert server.process.wait(20) == 0
    assert children
    assert not any(map(is_alive, children))


def test_a_second_sigterm_ends_at_once(start):
    server = start("--drain-seconds", "60").wait_until_ready()
    thread, read = read_in_background(server, 2000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(8) == 0
    thread.join(20)
    assert read[-1] != "length"


def test_an_engine_that_is_killed_fails_its_answers_and_comes_back(start):
    server = start().wait_until_ready()
    thread, read = read_in_background(server, 2000)
    before = server.engine_pid()
    os.kill(before, signal.SIGKILL)
    thread.join(20)
    assert isinstance(read[-1], openai.APIError)
    assert "the engine failed" in str(read[-1])
    server.wait_for(lambda: server.health()[0] == 503)
    assert server.health()[1]["status"] == "restarting"
    server.wait_until_ready()
    assert server.engine_pid() != before
    with client_of(server) as client:
        assert client.completions.create(model="tiny", prompt="x", max_tokens=3).usage.completion_tokens == 3
    assert server.metric("benthic:engine_restarts_total") == 1
    server.stop()


def test_an_engine_that_hangs_is_unhealthy_and_then_started_anew(start):
    server = start("--limits.silence-seconds", "1", "--limits.hang-seconds", "3").wait_until_ready()
    os.kill(server.engine_pid(), signal.SIGSTOP)
    server.wait_for(lambda: server.health()[1]["status"] == "silent")
    assert server.health()[0] == 503
    server.wait_for(lambda: server.health()[1]["status"] == "restarting")
    server.wait_until_ready()
    server.stop()


def test_an_engine_ends_when_its_server_is_killed(start):
    server = start().wait_until_ready()
    children = server.children()
    server.process.kill()
    server.process.wait()
    assert children
    server.wait_for(lambda: not any(map(is_alive, children)), 10)


def test_too_many_answers_get_429_with_a_time_to_come_again(start):
    server = start("--max-sequences", "1", "--limits.queue", "1").wait_until_ready()
    threads = [read_in_background(server, 2000)[0]]
    with client_of(server) as client:
        waiting = threading.Thread(target=client.completions.create, kwargs={"model": "tiny", "prompt": "x"})
        waiting.start()
        server.wait_for(lambda: server.metric("vllm:num_requests_waiting") == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for thread in [*threads, waiting]:
            thread.join(60)
    server.stop()


def test_an_answer_that_takes_too_long_is_ended(start):
    server = start("--limits.request-seconds", "0.3").wait_until_ready()
    with client_of(server) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="tiny", prompt=["x"] * 16, max_tokens=2000, extra_body={"ignore_eos": True})
        assert caught.value.status_code == 504
        assert caught.value.response.headers["x-should-retry"] == "false"
    server.wait_for(lambda: server.metric("vllm:kv_cache_usage_perc") == 0)
    server.stop()


@pytest.fixture(scope="module")
def locked(start, tmp_path_factory):
    """A server with two keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# clients\n{KEY}\n\n{OTHER_KEY}\n")
    server = start("--api-key-file", str(keys), "--block-size", "4").wait_until_ready()
    yield server
    server.stop()


def test_health_needs_no_key_and_a_key_opens(locked):
    assert locked.health()[0] == 200
    for key in (KEY, OTHER_KEY):
        with client_of(locked, key) as client:
            assert client.models.list().data[0].id == "tiny"
    with client_of(locked, "n" * 32) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_prompts_share_cached_blocks_within_a_key_and_a_salt_only(locked):
    prompt = list(range(50, 90))

    def cached(key, **more):
        with client_of(locked, key) as client:
            answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, extra_body=more)
            return answer.usage.prompt_tokens_details.cached_tokens

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER_KEY) == 0
    assert cached(KEY, cache_salt="mine") == 0
    assert cached(KEY, cache_salt="mine") > 0


def test_keys_that_cannot_be_are_told_at_the_start(folder, tmp_path, capsys):
    keys = tmp_path / "keys"
    for text, message in (
        ("", "no API key in"),
        ("short\n", "key 1 of"),
        (f"{KEY}\nwith space in the middle\n", "key 2 of"),
    ):
        keys.write_text(text)
        assert main(["serve", str(folder), "--api-key-file", str(keys)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 lets other machines in, and there is no API key"),
        (["--port", "0"], "port: Input should be greater than or equal to 1"),
        (["--limits.answers", "1000"], "answers: Input should be less than or equal to 128"),
        (["--limits.bodybytes", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_options_end_with_code_2_before_anything_listens(folder, options, message, capsys):
    assert main(["serve", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_address_in_use_and_a_broken_model_are_one_message(server, folder, start, tmp_path):
    again = start("--port", str(server.port))
    assert again.process.wait(60) == 2
    assert f"cannot listen on 127.0.0.1:{server.port}" in again.log.read_text()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    broken = start("--port", str(free_port()), model=tmp_path)
    assert broken.process.wait(60) == 2
    for one in (again, broken):
        assert "Traceback" not in one.log.read_text()
        assert "error: " in one.log.read_text()
