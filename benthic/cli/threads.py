"""How torch's threads wait for each other, decided once before torch is imported, and said with its reason.

Training a small model is thousands of short parallel loops a second. OpenMP's threads spin between them by default,
which is best while the cores are theirs; beside other work a spinning thread burns the time slice its partner needs.
Measured with `benthic train tiny` under OMP_WAIT_POLICY=ACTIVE and PASSIVE in turn, on two cores: 4,300 to 5,200
against 2,700 to 3,100 tokens/s alone, 300 to 700 against 1,400 to 2,500 beside two or three busy processes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from benthic.log import logger

_STATISTICS = Path("/proc/stat")
_SAMPLES, _INTERVAL_SECONDS = 20, 0.01


def choose_waiting() -> None:
    """Let threads sleep where other processes want the cores; OMP_WAIT_POLICY, if set, stands."""
    if "OMP_WAIT_POLICY" in os.environ or not _STATISTICS.is_file():
        return
    others = other_processes()
    if others >= 0.5:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        logger.info("threads sleep while they wait: %.1f other processes are running here", others)


def other_processes() -> float:
    """Processes that run or want to run beside this one, on average over a fifth of a second."""
    counts = []
    for _ in range(_SAMPLES):
        fields = dict(line.split(" ", 1) for line in _STATISTICS.read_text().splitlines() if " " in line)
        counts.append(int(fields["procs_running"]) - 1)
        time.sleep(_INTERVAL_SECONDS)
    return max(0.0, sum(counts) / len(counts))
