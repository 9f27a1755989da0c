"""How much memory a device has left, as its system tells."""

from __future__ import annotations

from pathlib import Path

import torch

from benthic.errors import CapacityError

_MEMINFO = Path("/proc/meminfo")


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where the system does not tell. Raises CapacityError for a GPU that is absent."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise CapacityError("device is 'cuda', but torch finds no CUDA GPU", hint="use device='cpu'")
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu" or not _MEMINFO.is_file():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
