"""`benthic chat --url`: what servers say, right and wrong, and what a user then reads."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benthic.cli.main import main
from tests.serve.running import free_port


class Scripted(ThreadingHTTPServer):
    """Answers each POST with the next of `answers`: a status, headers and a body; keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked, self.keys = [], [], []
        self.models = (200, {}, json.dumps({"data": [{"id": "only"}]}))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self):
        self._answer(*(self.server.models if self.path == "/v1/models" else (404, {}, "")))

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        self.server.keys.append(self.headers["authorization"])
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self._answer(*self.server.answers.pop(0))

    def _answer(self, status, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


def stream(*deltas, done=True):
    chunks = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    lines = [": ping", *(f"data: {chunk}" for chunk in chunks), *(["data: [DONE]"] if done else [])]
    return 200, {"content-type": "text/event-stream"}, "".join(line + "\n\n" for line in lines)


def error(status, message, **headers):
    return status, headers, json.dumps({"error": {"message": message, "type": "x", "param": None, "code": None}})


@pytest.fixture
def server():
    with Scripted() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield one
        one.shutdown()
        thread.join()


@pytest.fixture
def chat(server, monkeypatch, capsys):
    def chat(typed, *arguments, url=None):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        code = main(["chat", "--url", url or server.url, *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return chat


def test_thought_is_shown_apart_and_not_sent_back(server, chat):
    server.answers = [
        stream(
            {"role": "assistant", "content": ""}, {"reasoning_content": "hm", "reasoning": "hm"}, {"content": "yes"}
        ),
        stream({"reasoning": "so"}, {"content": "no"}),
    ]
    code, out, err = chat("one\ntwo\n", "--system", "be short")
    assert (code, out) == (0, "yes\nno\n")
    assert "hm\nso\n" in err
    assert server.asked[0]["model"] == "only"
    assert server.asked[1]["messages"] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two"},
    ]


def test_parameters_are_sent_by_openai_s_names_and_only_where_given(server, chat):
    server.answers = [stream({"content": "a"})] * 3
    chat("x\n")
    chat("x\n", "--max-tokens", "5", "--temperature", "0", "--stop", "b", "--json-schema", '{"type": "object"}')
    chat("x\n", "--regex", "[ab]+")
    plain, bound, expression = server.asked
    assert set(plain) == {"model", "messages", "stream"}
    assert (bound["max_tokens"], bound["temperature"], bound["stop"]) == (5, 0, ["b"])
    assert bound["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert expression["structured_outputs"] == {"regex": "[ab]+"}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (error(400, "too long"), "answered 400: too long"),
        (error(401, "a key is needed"), "answered 401: a key is needed\nhint: --api-key-env NAME or --api-key-file"),
        (
            error(429, "queue full", **{"retry-after": "7"}),
            "answered 429: queue full\nhint: it is busy; ask again in 7 s",
        ),
        (error(503, "loading"), "answered 503: loading\nhint: it is loading, or about to stop"),
        ((401, {}, '{"error": "Unauthorized"}'), "answered 401: Unauthorized"),
        ((422, {}, '{"detail": [{"msg": "no"}]}'), 'answered 422: [{"msg": "no"}]'),
        ((502, {}, ""), "answered 502: Bad Gateway"),
        ((200, {}, "data: {}\n\ndata: [1]\n\n"), "sent what is no JSON object: b'[1]'"),
        ((200, {}, 'data: {"choices": [5]}\n\n'), "sent what is no chunk of a chat"),
        ((200, {}, 'data: {"error": {"message": "the engine failed"}}\n\n'), "failed: the engine failed"),
        (stream({"content": "half"}, done=False), "ended its answer before it was complete"),
    ],
)
def test_a_failed_answer_is_told_and_the_talk_goes_on_without_it(server, chat, answer, text):
    server.answers = [answer, stream({"content": "fine"})]
    code, out, err = chat("one\ntwo\n")
    assert text in err
    assert code == 0
    assert out.endswith("fine\n")
    assert server.asked[1]["messages"] == [{"role": "user", "content": "two"}]


def test_what_would_steer_the_terminal_is_left_out(server, chat, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    server.answers = [stream({"content": "a\x1b[2Jb\tc\nd\u009b"}), error(400, "bad\x1b]0;title\x07")]
    _, out, err = chat("x\ny\n")
    assert out.startswith("a[2Jb\tc\nd\n")
    assert "bad]0;title" in err
    assert "\x1b" not in err


def test_what_goes_to_a_file_is_what_the_model_said(server, chat):
    server.answers = [stream({"content": "a\x1bb"})]
    assert chat("x\n")[1] == "a\x1bb\n"


def test_the_key_comes_from_the_environment_or_a_file(server, chat, monkeypatch, tmp_path):
    server.answers = [stream({"content": "a"})] * 3
    monkeypatch.setenv("SOME_KEY", "secret-1")
    (tmp_path / "keys").write_text("# ours\n\nsecret-2\nsecret-3\n")
    chat("x\n")
    chat("x\n", "--api-key-env", "SOME_KEY")
    chat("x\n", "--api-key-file", str(tmp_path / "keys"))
    assert server.keys == [None, "Bearer secret-1", "Bearer secret-2"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--api-key-env", "NO_SUCH_KEY"], "there is no API key in the environment's NO_SUCH_KEY"),
        (["--api-key-env", "A", "--api-key-file", "b"], "both name a key"),
        (["--speculative"], "--speculative does not go with --url"),
        (["--regex", "a", "--grammar", "b"], "regex and grammar both bind the answer"),
        (["--json-schema", "{"], "--json-schema is not JSON"),
        (["folder"], "chat needs a FOLDER or --url, one of them"),
    ],
)
def test_contradictions_are_refused_before_anything_is_sent(chat, arguments, text):
    code, _, err = chat("x\n", *arguments)
    assert code == 2
    assert text in err


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:8000", "is no address of a server"),
        ("ftp://127.0.0.1", "is no address of a server"),
        ("http://127.0.0.1:99999", "is no address of a server"),
        ("http://user:word@127.0.0.1", "has a user, a query or a fragment"),
        ("http://does-not-exist.invalid", "there is no host 'does-not-exist.invalid'"),
    ],
)
def test_a_wrong_address_is_told(chat, url, text):
    code, _, err = chat("x\n", url=url)
    assert code == 2
    assert text in err


def test_a_refused_connection_says_how_to_start_a_server(chat):
    code, _, err = chat("x\n", url=f"http://127.0.0.1:{free_port()}")
    assert code == 2
    assert "nothing listens at http://127.0.0.1" in err
    assert "benthic serve FOLDER" in err


def test_a_server_of_several_models_wants_a_name(server, chat):
    server.models = (200, {}, json.dumps({"data": [{"id": "a"}, {"id": "b"}]}))
    code, _, err = chat("x\n")
    assert code == 2
    assert "has 2 models: a, b\nhint: --model names one" in err
    server.answers = [stream({"content": "y"})]
    assert chat("x\n", "--model", "b", url=f"{server.url}/v1")[1] == "y\n"
    assert server.asked[0]["model"] == "b"


def test_what_is_no_server_of_models_is_told(server, chat):
    server.models = (200, {}, "<html>")
    assert "lists its models in no way" in chat("x\n")[2]


def test_it_does_not_import_torch(server):
    server.answers = [stream({"content": "y"})]
    code = (
        "import sys; from benthic.cli.main import main\n"
        f"assert main(['chat', '--url', {server.url!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'starlette' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], input="x\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "y\n"
