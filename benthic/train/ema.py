"""An exponential average of the weights: where a decayed learning rate would arrive (arXiv:2412.19437, 3.2.3).

Biases of the routers are averaged with the weights they were balanced for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from benthic.parallel.placement import forget_gathered, local


class Average:
    """float32 averages by name, in the memory of the weights' device.

    Update n uses min(decay, (1 + n) / (10 + n)), so that the untrained start does not stay in the average.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._tensors = {name: self._first(weight.detach()) for name, weight in weights.items()}

    def _first(self, weight: Tensor) -> Tensor:
        return weight.float().clone()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The averages, all updates done."""
        return self._tensors

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Move towards `weights`, which have had `updates` updates."""
        self._move([weights[name].detach() for name in self._tensors], updates)

    @torch.no_grad()
    def _move(self, weights: list[Tensor], updates: int) -> None:
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self._tensors.values()), weights, 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over saved averages."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextmanager
    def installed(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, `model` computes with the averages; its own tensors are put back afterwards, bit for bit."""
        averages = self.tensors
        live = {name: local(tensor) for name, tensor in model.state_dict().items() if name in averages}
        forget_gathered(model)
        kept = {name: tensor.clone() for name, tensor in live.items()}
        try:
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(averages[name])
            yield
        finally:
            forget_gathered(model)
            with torch.no_grad():
                for name, tensor in live.items():
                    tensor.copy_(kept[name])


class OffloadedAverage(Average):
    """Averages in the processor's memory, moved by the processor while `device` makes the next update (3.2.3).

    Weights of a GPU are copied to pinned memory on a stream of their own; those that live on the processor already
    are read where they are, once all that `device` was given before has written them. Before either changes, `let_go`
    must be called.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float, device: torch.device) -> None:
        super().__init__(weights, decay)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="average")
        self._moving: Future[None] | None = None
        # Weights of a GPU pass through here on their way.
        self._passing = {
            name: torch.empty(weight.shape, dtype=torch.float32, pin_memory=True)
            for name, weight in weights.items()
            if weight.is_cuda
        }
        self._reads_in_place = len(self._passing) < len(weights)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    def _first(self, weight: Tensor) -> Tensor:
        return weight.float().cpu() if weight.is_cuda else weight.float().clone()

    @property
    def tensors(self) -> dict[str, Tensor]:
        self._join()
        return self._tensors

    def _join(self) -> None:
        if self._moving is not None:
            self._moving.result()
            self._moving = None

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Begin to move towards `weights`; the move before has ended."""
        self._join()
        if self._stream is not None and self._copied is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for name, passing in self._passing.items():
                    passing.copy_(weights[name].detach(), non_blocking=True)
            self._copied.record(self._stream)
        readable = [self._passing.get(name, weights[name].detach()) for name in self._tensors]
        self._moving = self._thread.submit(self._move_when_copied, readable, updates)

    def _move_when_copied(self, weights: list[Tensor], updates: int) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        self._move(weights, updates)

    def let_go(self) -> None:
        """Weights may change after this: on the GPU what is enqueued next waits for the copy, and the host for what
        is read in place."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        if self._reads_in_place:
            self._join()
