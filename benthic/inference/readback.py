"""Numbers on their way from the device to the host: nobody waits until they are read."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """A device's tensor, copied as it is now, whatever is launched after."""

    def __init__(self, tensor: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = tensor.to("cpu", non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()
        else:
            self._copy = tensor.clone()

    def wait(self) -> Tensor:
        """The copy, when it has arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._copy
