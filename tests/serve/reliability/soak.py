"""Mixed load for a long time, a part of whose clients leaves early; and what the server's processes hold meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.serve.reliability.load import CHAT, PLAIN, Outcome, ask
from tests.serve.reliability.processes import descriptors, resident_bytes
from tests.serve.running import RunningServer

WORDS = ("def", "return", "first", "second", "add", "self", "None", "import", "class", "for")


@dataclass
class Sample:
    """What the server and its engine hold at one moment."""

    at: float
    resident: tuple[int, int]
    descriptors: tuple[int, int]


@dataclass
class Soak:
    """What a campaign found."""

    samples: list[Sample] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    left: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(self.kinds.values())

    def resident(self, process: int, begin: float, end: float) -> float:
        """Median bytes of one process (0 the server, 1 the engine) between two shares of the time."""
        part = self.samples[int(begin * len(self.samples)) : int(end * len(self.samples))]
        return statistics.median(one.resident[process] for one in part)

    def curve(self, points: int) -> list[list[float]]:
        """MiB of both processes over time."""
        every = max(1, len(self.samples) // points)
        return [[round(one / 2**20, 1) for one in sample.resident] for sample in self.samples[::every]]


def request_of(chance: random.Random) -> tuple[str, str, dict[str, Any], int]:
    """A kind, a path, a body, and the status that it deserves."""
    text = " ".join(chance.choices(WORDS, k=chance.choice((3, 10, 40, 120))))
    body: dict[str, Any] = {"max_tokens": chance.choice((1, 8, 32, 96)), "temperature": chance.choice((0, 1))}
    body |= {"stream": chance.random() < 0.6, "ignore_eos": True, "seed": chance.randrange(1000)}
    plain = body | {"prompt": text}
    chat = body | {"messages": [{"role": "system", "content": "def add"}, {"role": "user", "content": text}]}
    number = chance.randrange(10**9 if chance.random() < 0.2 else 20)
    schema = {"type": "object", "properties": {f"x{number}": {"type": "boolean"}}, "required": [f"x{number}"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    choices: dict[str, tuple[str, dict[str, Any], int]] = {
        "plain": (PLAIN, plain, 200),
        "chat": (CHAT, chat, 200),
        "several": (PLAIN, plain | {"prompt": [text, "def"], "n": 2}, 200),
        "stop": (PLAIN, plain | {"stop": ["ret", "zzz"]}, 200),
        "logprobs": (CHAT, chat | {"logprobs": True, "top_logprobs": 5}, 200),
        "form": (CHAT, chat | {"response_format": form, "max_tokens": 64, "ignore_eos": False}, 200),
        "salted": (PLAIN, plain | {"cache_salt": str(number)}, 200),
        "penalties": (PLAIN, plain | {"frequency_penalty": 0.5, "logit_bias": {"50": -5}}, 200),
        "long": (PLAIN, plain | {"prompt": [chance.randrange(10, 250) for _ in range(600)], "max_tokens": 4}, 200),
        "wrong field": (CHAT, chat | {"temperature": 9}, 400),
        "wrong form": (CHAT, chat | {"response_format": form | {"json_schema": {"name": "x", "schema": 1}}}, 400),
        "too long": (PLAIN, plain | {"prompt": [5] * 9000}, 400),
    }
    kind = chance.choices(list(choices), [4, 4, 1, 1, 1, 2, 1, 1, 1, 0.3, 0.3, 0.3])[0]
    return kind, *choices[kind]


async def soak(server: RunningServer, seconds: float, clients: int, leaving: float, every: float) -> Soak:
    """`clients` at once for `seconds`, a share `leaving` of whose requests is given up; a sample `every` seconds."""
    found, end = Soak(), time.monotonic() + seconds
    pids = server.process.pid, server.engine_pid()
    tasks = [asyncio.create_task(_client(server, random.Random(seed), leaving, end, found)) for seed in range(clients)]
    began = time.monotonic()
    while time.monotonic() < end:
        await asyncio.sleep(every)
        held = tuple(resident_bytes(pid) for pid in pids), tuple(descriptors(pid) for pid in pids)
        found.samples.append(Sample(time.monotonic() - began, *held))
    await asyncio.gather(*tasks)
    return found


async def _client(server: RunningServer, chance: random.Random, leaving: float, end: float, found: Soak) -> None:
    while time.monotonic() < end:
        kind, path, body, status = request_of(chance)
        found.kinds[kind] += 1
        if status == 200 and chance.random() < leaving:
            body["max_tokens"] = 96
            events, patience = chance.randrange(1, 20), chance.uniform(0.0, 0.4)
            leaves = _after(events) if body["stream"] else None
            outcome = await ask(
                server.port,
                path,
                body,
                leaves,
                patience=None if body["stream"] else patience,
                abrupt=chance.random() < 0.5,
            )
            found.left += outcome.has_left
        else:
            outcome = await ask(server.port, path, body)
            found.statuses[outcome.status] += 1
            if outcome.status != status or (status == 200 and body["stream"] and not outcome.has_done):
                found.broken.append(f"{kind}: {outcome.status} {outcome.errors} for {json.dumps(body)[:300]}")
        await asyncio.sleep(chance.uniform(0.0, 0.1))


def _after(events: int):
    def leaves(outcome: Outcome) -> bool:
        return len(outcome.events) >= events

    return leaves
