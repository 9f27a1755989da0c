"""`benthic bench serve` against a running server, and what it says where that goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import pytest

from benthic.cli.main import main
from tests.serve.running import free_port

SMALL = "--requests 6 --prompt-tokens 12 --new-tokens 5".split()


def test_every_token_asked_for_is_counted_and_the_result_is_kept(server, folder, tmp_path, capsys):
    output = tmp_path / "new" / "serve.json"
    arguments = ["bench", "serve", "--url", server.url, "--model", str(folder), *SMALL, "--concurrency", "2"]
    assert main([*arguments, "--goodput", "ttft:60000", "e2el:60000", "--output", str(output)]) == 0
    assert "completed 6, failed 0" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (6, 72, 30)
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert 0 < result["median_ttft_ms"] <= result["median_e2el_ms"]
    assert result["served_model"] == "tiny"
    assert result["workload"]["concurrency"] == 2


def test_at_a_rate_all_arrive_within_requests_over_rate(server, folder, capsys):
    arguments = ["bench", "serve", "--url", server.url, "--model", str(folder), *SMALL, "--rate", "50", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["duration"] >= 6 / 50


def test_errors_are_counted_by_name(server, folder, capsys):
    arguments = ["bench", "serve", "--url", server.url, "--model", str(folder), *SMALL, "--prompt-tokens", "5000"]
    assert main([*arguments, "--warm-up", "0", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed"] == 6
    assert "failed: 6 of 6: 400: This model's maximum context length is 2048 tokens." in shown.err
    assert main(arguments) == 2
    assert "failed while warming up: 400: This model's maximum context length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', "the stream ended without its usage"),
        ('data: {"choices": [{"text": "a"}]}\n\n', "the stream ended without [DONE]"),
        ('data: {"error": {"message": "the engine failed"}}\n\n', "in the stream: the engine failed"),
        ("data: {\n\n", "the connection or its content broke: JSONDecodeError"),
        ("data: 5\n\n", "the connection or its content broke: TypeError"),
    ],
)
def test_a_broken_stream_is_a_failure(answer, error, capsys):
    with scripted(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + answer.encode()) as url:
        arguments = ["bench", "serve", "--url", url, "--model", "tiny", *SMALL, "--warm-up", "0"]
        assert main(arguments) == 1
    assert f"failed: 6 of 6: {error}" in capsys.readouterr().err


def test_an_answer_that_never_ends_fails_in_time(capsys):
    with scripted(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n") as url:
        arguments = ["bench", "serve", "--url", url, "--model", "tiny", *SMALL, "--warm-up", "0"]
        assert main([*arguments, "--request-seconds", "0.2"]) == 1
    assert "6 of 6: no complete answer within 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "no-such-thing"], "the vocabulary of --model 'no-such-thing' is unknown"),
        (["--model", "tiny", "--goodput", "speed:5"], "speed:5 is no bound"),
        (["--model", "tiny", "--goodput", "ttft:soon"], "invalid _bound value: 'ttft:soon'"),
        (["--model", "tiny", "--api-key-env", "NO_SUCH_KEY"], "there is no API key in the environment's NO_SUCH_KEY"),
        (["--model", "tiny"], "nothing listens at http://127.0.0.1"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(arguments, text, capsys):
    assert main(["bench", "serve", "--url", f"http://127.0.0.1:{free_port()}", *arguments]) == 2
    assert text in capsys.readouterr().err


@contextlib.contextmanager
def scripted(answer: bytes):
    """A server that lists one model, and gives every completion the same bytes."""
    names = b'{"data": [{"id": "m"}]}'

    async def handle(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(names) + names)
            else:
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(answer)
            if b"content-length: 5" in answer and not head.startswith(b"GET"):
                await reader.read()  # silent until the client leaves
        writer.close()

    async def serve():
        nonlocal port, end
        end = asyncio.Event()
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        started.set()
        await end.wait()
        server.close()
        await server.wait_closed()

    port, end, started, loop = 0, None, threading.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.close()))
    thread.start()
    started.wait()
    yield f"http://127.0.0.1:{port}"
    loop.call_soon_threadsafe(end.set)
    thread.join()
