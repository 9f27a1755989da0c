"""Ranks of a test: processes of a server that has imported torch once, on gloo, each result or error brought back."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 90
"""Until the ranks of a test are given up."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["benthic.train.run", "torch.distributed.fsdp", "tests.train.small"])


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `size` ranks; the first rank's error where one fails."""
    port = _free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
    ranks = [
        _CONTEXT.Process(target=_rank, args=(pipe, rank, size, port, function, arguments), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for one in ranks:
        one.start()
    for _, sending in pipes:
        sending.close()
    try:
        return _results([receiving for receiving, _ in pipes])
    finally:
        for one in ranks:
            one.kill()
            one.join()


def _results(pipes: list[Connection]) -> list[Any]:
    ends = time.monotonic() + SECONDS
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0, ends - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(set(range(len(pipes))) - set(results))} said nothing in {SECONDS} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            done, result = pickle.loads(pipe.recv_bytes())
            if not done:
                raise AssertionError(f"rank {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # Plain bytes: what a Pipe does with tensors (shared memory) ends with the process that sent them.
    try:
        message = pickle.dumps((True, function(*arguments)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(message)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
