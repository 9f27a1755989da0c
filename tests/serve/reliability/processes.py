"""What a process holds, as Linux tells it."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Its memory in RAM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def descriptors(pid: int) -> int:
    """Its open files and sockets."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
