"""What a server adds to its engine: `python -m benchmarks.server_overhead --model FOLDER --clients 32`.

The same requests go to an engine alone, in a process of its own, and through `benthic serve` to as many streaming
clients, in turn, for several rounds. All prompts are new in every round; greedy answers of exact length. The overhead
of a streamed token is the difference of the wall times over the tokens; beside it stands the processor time that the
server's process spent on a token, and the clients' own, which on a small machine comes out of the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from statistics import median
from typing import IO, Any

import numpy as np
from pydantic import Field

from benchmarks.light_load import Load, stream_all
from benchmarks.machine import describe
from benthic.config.settings import Settings
from benthic.errors import BenthicError, RunError
from benthic.files import write_atomic

START_SECONDS = 300.0
TICK = 1 / os.sysconf("SC_CLK_TCK")


class Workload(Settings):
    """What is asked of both sides, and how often."""

    model: Path
    clients: int = Field(32, ge=1)
    prompt_tokens: int = Field(32, ge=1)
    new_tokens: int = Field(128, ge=2)
    rounds: int = Field(7, ge=1)
    seed: int = Field(0, ge=0)

    @property
    def engine(self) -> dict[str, int]:
        """Settings of both engines: room for all, and for two rounds in the cache."""
        blocks = -(-(self.prompt_tokens + self.new_tokens + 1) // 64)
        return {"max_sequences": self.clients, "num_blocks": 2 * blocks * self.clients}


class Alone:
    """An engine without a server."""

    def __init__(self, workload: Workload) -> None:
        command = [sys.executable, "-m", "benchmarks.engine_alone", str(workload.model), json.dumps(workload.engine)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.vocabulary: int = self._said()["vocabulary"]

    def answer(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
        """Seconds and tokens."""
        _pipe(self._process.stdin).write(json.dumps({"prompts": prompts, "new_tokens": new_tokens}) + "\n")
        _pipe(self._process.stdin).flush()
        return self._said()

    def end(self) -> None:
        _pipe(self._process.stdin).close()
        self._process.wait()
        _pipe(self._process.stdout).close()

    def _said(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise RunError("the engine alone ended; what it said of it is above")
        return json.loads(line)


class Served:
    """`benthic serve` on a free port."""

    def __init__(self, workload: Workload, log: IO[bytes]) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port: int = one.getsockname()[1]
        options = [f"--{name.replace('_', '-')}={value}" for name, value in workload.engine.items()]
        command = [sys.executable, "-m", "benthic", "serve", str(workload.model), "--port", str(self.port), *options]
        self._process, self._log = subprocess.Popen(command, stdout=log, stderr=log), log
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        (self._engine,) = self._children()

    def answer(self, prompts: list[list[int]], new_tokens: int) -> tuple[Load, float, float]:
        """The load's times, and processor seconds of the server's process and of its engine's."""
        asked = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        options = {"stream_options": {"include_usage": True}}
        bodies = [json.dumps({"prompt": prompt, **asked, **options}).encode() for prompt in prompts]
        before = [_processor_seconds(pid) for pid in (self._process.pid, self._engine)]
        load = stream_all(self.port, bodies)
        after = [_processor_seconds(pid) for pid in (self._process.pid, self._engine)]
        server, engine = (b - a for a, b in zip(before, after, strict=True))
        return load, server, engine

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise RunError(f"the server did not start: {self._log.read()[-1000:].decode(errors='replace')}")
            time.sleep(0.1)

    def _children(self) -> list[int]:
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it ended meanwhile
                continue
            if parent == self._process.pid and b"engine_process" in (stat.parent / "cmdline").read_bytes():
                found.append(int(stat.parent.name))
        return found


def measure(workload: Workload) -> dict[str, Any]:
    """Both sides in turn, after one round of each that does not count."""
    machine = describe(("torch", "granian", "starlette"))
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryFile() as log:
        served = Served(workload, log)
        try:
            alone = Alone(workload)
            try:
                dice = np.random.default_rng(workload.seed)
                shape = (workload.clients, workload.prompt_tokens)
                for number in range(workload.rounds + 1):
                    prompts = dice.integers(0, alone.vocabulary, shape).tolist()
                    one = _round(alone, served, prompts, workload.new_tokens)
                    rounds += [one] if number else []
            finally:
                alone.end()
        finally:
            served.end()
    shown = {name: _spread([one[name] for one in rounds]) for name in rounds[0]}
    return {
        "name": "server_overhead",
        "workload": workload.model_dump(mode="json"),
        "machine": machine,
        "load_average_after": os.getloadavg()[0],
        "summary": shown,
        "rounds": rounds,
    }


def _round(alone: Alone, served: Served, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    engine = alone.answer(prompts, new_tokens)
    load, server, behind = served.answer(prompts, new_tokens)
    if load.tokens != engine["tokens"]:
        raise RunError(f"the server gave {load.tokens} tokens, its engine alone {engine['tokens']}")
    busy = server + behind + load.processor_seconds
    return {
        "alone_tokens_per_second": engine["tokens"] / engine["seconds"],
        "served_tokens_per_second": load.tokens / load.seconds,
        "added_share": load.seconds / engine["seconds"] - 1,
        "overhead_us_per_token": (load.seconds - engine["seconds"]) / load.tokens * 1e6,
        "server_processor_us_per_token": server / load.tokens * 1e6,
        "client_processor_us_per_token": load.processor_seconds / load.tokens * 1e6,
        "client_share_of_processor_time": load.processor_seconds / busy,
        "tokens_per_chunk": load.tokens / load.chunks,
    }


def table(result: dict[str, Any]) -> str:
    """Medians and the spread of rounds."""
    workload, machine = result["workload"], result["machine"]
    lines = [
        f"{workload['clients']} streaming clients, {workload['prompt_tokens']} tokens for {workload['new_tokens']}; "
        f"{machine['processor']}, {machine['cores']} cores",
        f"{'median (fastest to slowest of ' + str(workload['rounds']) + ' rounds)':<46}",
    ]
    for name, (text, scale, digits) in SHOWN.items():
        values = [result["summary"][name][kind] * scale for kind in ("median", "least", "most")]
        middle, least, most = (f"{value:,.{digits}f}" for value in values)
        lines.append(f"  {text:<44}{middle:>10}   {least} to {most}")
    if result["load_average_after"] > 3 * machine["cores"] or (machine["load_average_before"] or 0) > 0.5:
        lines.append(f"The machine was busy before: {machine['load_average_before']:.1f} other processes ran.")
    return "\n".join(lines) + "\n"


SHOWN = {
    "alone_tokens_per_second": ("engine alone, tokens/s", 1, 0),
    "served_tokens_per_second": ("through the server, tokens/s", 1, 0),
    "added_share": ("added to the time, %", 100, 1),
    "overhead_us_per_token": ("overhead of a streamed token, us", 1, 1),
    "server_processor_us_per_token": ("server's processor time of a token, us", 1, 1),
    "client_processor_us_per_token": ("clients' processor time of a token, us", 1, 1),
    "client_share_of_processor_time": ("clients' share of all processor time, %", 100, 1),
}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values)}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def main(arguments: list[str]) -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(prog="benchmarks.server_overhead", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="folder")
    for name in ("clients", "prompt-tokens", "new-tokens", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--output", type=Path, help="keep the result as JSON")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    try:
        result = measure(Workload(**{name: value for name, value in options.items() if value is not None}))
        if output is not None:
            write_atomic(output, json.dumps(result, indent=2) + "\n")
    except BenthicError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
