"""What is not JSON, or no JSON that a request could be, is a 400 and costs nobody else anything."""

from __future__ import annotations

import json

from tests.serve.speaking import CHAT, HELLO, PLAIN, assert_refused, post

FINE = b'{"prompt": "x", "max_tokens": 2, "stop": ["a"], "logit_bias": {"5": 1.5}, "n": 1}'
NUMBERS = ("temperature", "top_p", "min_p", "max_tokens", "n", "seed", "presence_penalty", "frequency_penalty")
TEXTS = ("prompt", "user", "cache_salt", "stop", "suffix", "model")


def with_value(field: str, value: str) -> bytes:
    return f'{{"messages": {json.dumps(HELLO)}, "{field}": {value}}}'.encode()


def nested(opening: str, closing: str, depth: int) -> bytes:
    return f'{{"user": {opening * depth}1{closing * depth}}}'.encode()


PLAIN_BODIES = {
    "cut off": [FINE[:size] for size in range(len(FINE))],
    "a NUL": [FINE[:place] + b"\x00" + FINE[place:] for place in range(0, len(FINE), 4)],
    "another encoding": [FINE.decode().encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")]
    + [b"\xef\xbb\xbf" + FINE],
    "not UTF-8": [
        b'{"prompt": "' + bad + b'"}'
        for bad in (
            b"\xff",
            b"\x80",
            b"\xc3",
            b"\xe9",
            b"\xc0\xaf",
            b"\xc1\xbf",
            b"\xe0\x80\xaf",
            b"\xed\xa0\x80",
            b"\xed\xbf\xbf",
            b"\xf0\x80\x80\x80",
            b"\xf4\x90\x80\x80",
            b"\xf8\x88\x80\x80\x80",
            b"\xe2\x82",
            b"\xf0\x9f\x98",
        )
    ],
    "half a surrogate pair": [
        b'{"prompt": "x", "%s": "\\u%s"}' % (field.encode(), half) for field in TEXTS[1:] for half in (b"d800", b"dfff")
    ]
    + [b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00\\ud800"}', b'{"\\ud800": 1}'],
    "not a request": [b"null", b"[]", b"[{}]", b'"x"', b"1", b"-1.5", b"true", b"false", b" ", b"\n", b"[[[]]]"],
    "almost JSON": [
        b"{'prompt': 'x'}",
        b'{prompt: "x"}',
        b'{"prompt": "x",}',
        b'{"prompt": ["x",]}',
        b'{"prompt" "x"}',
        b'{"prompt": "x" "n": 1}',
        b'{"prompt": "x"} {}',
        b'{"prompt": "x"}]',
        b'{"prompt": "x"}; drop',
        b'// x\n{"prompt": "x"}',
        b'{"prompt": "x" /* n */}',
        b'{"prompt": "\\x41"}',
        b'{"prompt": "\\u12"}',
        b'{"prompt": "\t"}',
        b'{"prompt": "\n"}',
        b'{"prompt": "' + b"\\" * 9999,
        b'{"prompt": "x", "n": 01}',
        b'{"prompt": "x", "n": +1}',
        b'{"prompt": "x", "n": 0x1}',
        b'{"prompt": "x", "n": 1_0}',
        b'{"prompt": "x", "top_p": .5}',
        b'{"prompt": "x", "top_p": 1.}',
        b'{"prompt": "x", "n": --1}',
        b'{"prompt": "x", "stream": True}',
        b'{"prompt": "x", "stop": None}',
        b'{"prompt": "x", "stop": undefined}',
        b"prompt=x&n=1",
        b"<prompt>x</prompt>",
        b"\x1f\x8b\x08\x00",
    ],
    "twice the same name": [
        b'{"prompt": "x", "prompt": "x"}',
        b'{"prompt": "x", "n": 1, "n": 2}',
        b'{"prompt": "x", "logit_bias": {"5": 1, "5": 1}}',
        b'{"prompt": "x", "stream": true, "stream_options": {"include_usage": true, "include_usage": true}}',
        b'{"prompt": "x", "\\u006e": 1, "n": 1}',
    ],
    "too deep": [nested(*pair, depth) for pair in (("[", "]"), ('{"a":', "}")) for depth in (65, 100, 1000, 10_000)]
    + [b'{"prompt": ' + b"[" * 100_000, b'{"a":' * 10_000],
}
CHAT_BODIES = {
    "not a number": [with_value(field, name) for field in NUMBERS for name in ("NaN", "Infinity", "-Infinity")],
    "beyond a double": [with_value(field, number) for field in NUMBERS for number in ("1e400", "-1e400")],
    "beyond 64 bits": [
        with_value(field, number)
        for field in NUMBERS
        for number in (str(2**63), str(-(2**64)), "1" + "0" * 400, "9" * 5000)
    ],
    "a half surrogate pair deep inside": [
        with_value("tools", '[{"type": "function", "function": {"name": "f", "description": "\\ud800"}}]'),
        with_value("tools", '[{"type": "function", "function": {"name": "f", "parameters": {"x": "\\ud800"}}}]'),
        with_value("stop", '["\\udfff"]'),
        with_value("logit_bias", '{"\\ud800": 1}'),
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a\\udc00"}]}]}',
        b'{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}',
    ],
}


def test_there_are_two_hundred_of_them():
    bodies = [body for kinds in (PLAIN_BODIES, CHAT_BODIES) for some in kinds.values() for body in some]
    assert len(set(bodies)) >= 200


def test_each_is_a_400_in_openai_s_shape_and_the_next_request_is_answered(server):
    for path, kinds in ((PLAIN, PLAIN_BODIES), (CHAT, CHAT_BODIES)):
        for kind, bodies in kinds.items():
            for body in bodies:
                status, answer = post(server, path, body)
                assert status == 400, (kind, body[:200], answer)
                assert_refused((status, answer), 400)
    assert post(server, PLAIN, FINE)[0] == 200
    assert "Traceback" not in server.log.read_text()
