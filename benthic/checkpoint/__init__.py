"""Floor 5: tensors by name, published checkpoint folders in and out.

Names are resolved on first use: what reads headers alone (`folder`, `layout`, `inspection`) works without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benthic.checkpoint.conversion import convert as convert
    from benthic.checkpoint.inspection import inspect_folder as inspect_folder
    from benthic.checkpoint.reader import Checkpoint as Checkpoint
    from benthic.checkpoint.reader import load_into as load_into
    from benthic.checkpoint.reader import open_checkpoint as open_checkpoint
    from benthic.checkpoint.reader import read_weights as read_weights
    from benthic.checkpoint.writer import WeightFormat as WeightFormat
    from benthic.checkpoint.writer import write_checkpoint as write_checkpoint

_HOME = {
    "Checkpoint": "reader",
    "WeightFormat": "writer",
    "convert": "conversion",
    "inspect_folder": "inspection",
    "load_into": "reader",
    "open_checkpoint": "reader",
    "read_weights": "reader",
    "write_checkpoint": "writer",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"benthic.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module 'benthic.checkpoint' has no attribute {name!r}")
