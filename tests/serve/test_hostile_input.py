"""What no client of good will sends costs its sender a clear refusal, and nobody else anything."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.serve.speaking import CHAT, HELLO, PLAIN, assert_refused, post, raw

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.01}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {str(one): 1 for one in range(2000)}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"audio": {}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"max_token": 3}, "max_token"),
        ({"Foo": 3}, "Foo"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_out_of_bounds_is_a_400_that_names_it(server, changes, param):
    assert_refused(post(server, CHAT, {"messages": HELLO, "max_tokens": 3, **changes}), 400, param)


def test_a_whole_number_may_be_written_as_a_float(server):
    status, body = post(server, PLAIN, b'{"prompt": [5.0, 6e0], "max_tokens": 3.0, "ignore_eos": true}')
    assert status == 200
    assert body["usage"]["completion_tokens"] == 3
    assert_refused(post(server, PLAIN, {"prompt": "x", "max_tokens": 2.5}), 400, "max_tokens")
    assert_refused(post(server, PLAIN, {"prompt": "x", "seed": 1e18}), 400, "seed")


def test_an_unknown_parameter_is_told_with_the_nearest_known_one(server):
    _, body = post(server, CHAT, {"messages": HELLO, "max_token": 3})
    assert body["error"]["message"] == "unknown or unsupported parameter 'max_token'; did you mean 'max_tokens'?"
    assert body["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("schema", "code"),
    [
        ({"type": "nonsense"}, "invalid_schema"),
        ({"type": "string", "pattern": "("}, "invalid_schema"),
        ({"$ref": "http://127.0.0.1/x.json"}, "invalid_schema"),
        ({"enum": list(range(10_000))}, "schema_too_large"),
        ({"description": "x" * 70_000}, "schema_too_large"),
    ],
    ids=["type", "pattern", "reference", "nodes", "bytes"],
)
def test_schemas_that_cannot_be_used_are_a_400(server, schema, code):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = post(server, CHAT, {"messages": HELLO, "response_format": format_})
    assert_refused(answer, 400, "response_format.json_schema.schema", code)


def test_other_content_types_and_too_long_bodies_are_told_so(server):
    assert_refused(post(server, PLAIN, b"x=1", **{"content-type": "text/plain"}), 415)
    assert_refused(post(server, PLAIN, {"prompt": "x" * 5_000_000}), 413, code="body_too_large")


def test_a_long_body_that_does_not_tell_its_length_is_cut_off(server):
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        received = b""
        try:
            one.sendall(head)
            for _ in range(6):
                one.sendall(chunk)
            received = one.recv(65536)
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert not received or b" 413 " in received.split(b"\r\n")[0]


def test_a_body_that_never_ends_and_headers_that_never_end_are_closed(server):
    head = HEAD + b"content-length: 100\r\n\r\n{"
    began = time.monotonic()
    assert b" 408 " in raw(server, head).split(b"\r\n")[0]
    assert raw(server, b"GET /health HTTP/1.1\r\nhost") == b""
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("chunks", [b"zz\r\nabc\r\n", b"-1\r\nabc\r\n", b"f" * 17 + b"\r\nabc\r\n"])
def test_chunks_of_a_size_that_is_none_are_a_400_in_the_server_s_own_words(server, chunks):
    received = raw(server, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks)
    assert b" 400 " in received.split(b"\r\n")[0]
    assert json.loads(received.rpartition(b"\r\n")[2])["error"]["code"] == "broken_body"


def test_more_messages_than_are_allowed_are_a_400_wherever_they_are_sent(server):
    for path in (CHAT, "/tokenize"):
        assert_refused(post(server, path, {"messages": HELLO * 2049}), 400, "messages")


def test_large_and_many_headers_are_a_431(server):
    assert b" 431 " in raw(server, b"GET /health HTTP/1.1\r\nx: " + b"a" * 200_000 + b"\r\n\r\n")
    many = b"".join(b"x%d: 1\r\n" % number for number in range(150))
    assert b" 431 " in raw(server, b"GET /health HTTP/1.1\r\n" + many + b"\r\n")


def stream_head(max_tokens):
    body = json.dumps({"prompt": "def", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}).encode()
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def test_who_does_not_read_is_closed_and_frees_its_blocks(server):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.settimeout(10)
        one.connect(("127.0.0.1", server.port))
        body = {"prompt": ["def"] * 16, "max_tokens": 2000, "stream": True, "ignore_eos": True, "logprobs": 20}
        content = json.dumps(body).encode()
        one.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(content) + content)
        server.wait_for(lambda: server.metric("vllm:num_requests_running") > 0)
        server.wait_for(lambda: is_idle(server), 60)
    assert post(server, PLAIN, {"prompt": "x", "max_tokens": 2})[0] == 200


def is_idle(server):
    return server.metric("vllm:num_requests_running") == 0 and server.metric("vllm:kv_cache_usage_perc") == 0


def test_who_leaves_mid_stream_frees_its_blocks(server):
    before = server.metric("vllm:request_success_total")
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(stream_head(2000))
            while b"text_completion" not in one.recv(65536):
                pass
    server.wait_for(lambda: server.metric("vllm:request_success_total") == before + 5)
    server.wait_for(lambda: is_idle(server))


def test_who_leaves_before_a_whole_answer_frees_its_blocks(server):
    before = server.metric("vllm:request_success_total")
    body = stream_head(2000).replace(b'"stream": true', b'"stream":false')
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(body)
            server.wait_for(lambda: server.metric("vllm:num_requests_running") > 0)
        server.wait_for(lambda: is_idle(server))
    assert server.metric("vllm:request_success_total") == before + 5
