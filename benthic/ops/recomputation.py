"""Results that backward computes again instead of keeping them (DeepSeek-V3, section 3.2.3).

An operation marked `cheap` costs little beside the matrix products that read its result: norms, SwiGLU, what expands
latents. Inside a block of `dropping_cheap_results`, whatever autograd wants to keep of such a result (the whole or a
view) is replaced by how it was made: the function and its inputs, which may be made the same way. Backward makes it
once for all who kept it, with the same function on the same numbers, so that no gradient changes by a bit. What is kept
is decided by what autograd asks for, so operations need not know of each other; a product is never made twice unless it
is marked itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

P = ParamSpec("P")
R = TypeVar("R")


def cheap(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function of tensors, which returns one or a tuple, as cheaper to call again than its results to keep."""

    @wraps(function)
    def marked(*args: P.args, **kwargs: P.kwargs) -> R:
        results = function(*args, **kwargs)
        remember(results, function, *args, **kwargs)
        return results

    return marked


def remember(results: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Say that `function(*args, **kwargs)` equals `results` bit for bit, and is cheap."""
    memory = _memory.get()
    if memory is not None:
        memory.add(results, function, args, kwargs)


@contextmanager
def dropping_cheap_results() -> Iterator[None]:
    """Of the cheap results made in the block, autograd keeps how to make them."""
    memory = _Memory()
    token = _memory.set(memory)
    try:
        with saved_tensors_hooks(memory.pack, _unpack):
            yield
        memory.close()
    finally:
        _memory.reset(token)
        memory.forget()


class _View(NamedTuple):
    """What autograd keeps: a stretch of a result's storage."""

    source: _Source
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Source:
    """How results were made; and the results while some who kept a part of them have not asked for it yet."""

    def __init__(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        self._function, self._args, self._kwargs = function, args, kwargs
        self._kept = self._asked = 0
        self._made: tuple[Tensor, ...] = ()

    def view(self, index: int, tensor: Tensor) -> _View:
        self._kept += 1
        return _View(self, index, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def close(self, pack: Callable[[Tensor], Any]) -> None:
        """Keep inputs as autograd would, if any result was kept; else forget them."""
        if not self._kept:
            self._args, self._kwargs = (), {}
            return
        self._args = tuple(_kept_input(one, pack) for one in self._args)
        self._kwargs = {name: _kept_input(one, pack) for name, one in self._kwargs.items()}

    def make(self, index: int) -> Tensor:
        if not self._made:
            args = [_input(one) for one in self._args]
            kwargs = {name: _input(one) for name, one in self._kwargs.items()}
            # With gradients on, as the first time: some operations choose their way by it.
            with torch.enable_grad():
                results = self._function(*args, **kwargs)
            self._made = tuple(one.detach() for one in _tensors(results))
        result = self._made[index]
        self._asked += 1
        if self._asked == self._kept:
            self._asked, self._made = 0, ()
        return result


class _Memory:
    """The cheap results of one block by their storage, held until it ends so that no address changes hands."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[_Source, int, Tensor, int]] = {}
        self._sources: list[_Source] = []

    def add(self, results: Any, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        taken = {_address(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor)}
        source = _Source(function, args, kwargs)
        self._sources.append(source)
        for index, result in enumerate(_tensors(results)):
            # A result that is a view of an input is found under the input.
            if _address(result) not in taken and result.untyped_storage().nbytes():
                self._found[_address(result)] = source, index, result, result._version

    def pack(self, tensor: Tensor) -> Tensor | _View:
        source, index, result, version = self._found.get(_address(tensor), (None, 0, tensor, 0))
        # Written to since, or looked at as another dtype: kept as it is.
        if source is None or result.dtype != tensor.dtype or result._version != version:
            return tensor
        return source.view(index, tensor)

    def close(self) -> None:
        """Decide what inputs are kept, last made first: whether they are needed shows from what was made of them."""
        for source in reversed(self._sources):
            source.close(self.pack)

    def forget(self) -> None:
        self._found.clear()
        self._sources.clear()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.source.make(kept.index).as_strided(kept.size, kept.stride, kept.offset)


def _kept_input(one: Any, pack: Callable[[Tensor], Any]) -> Any:
    if not isinstance(one, Tensor):
        return one
    # A parameter is asked for its gradient again, as the first time; the graph that gives is dropped at once.
    return one if one.is_leaf else pack(one.detach())


def _input(one: Any) -> Any:
    return _unpack(one) if isinstance(one, _View) else one


_memory: ContextVar[_Memory | None] = ContextVar("_memory", default=None)
