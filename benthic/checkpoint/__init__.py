"""Tensors by name: published checkpoint folders in and out."""

from benthic.checkpoint.reader import Checkpoint, load_into, open_checkpoint, read_weights
from benthic.checkpoint.writer import WeightFormat, write_checkpoint

__all__ = ["Checkpoint", "WeightFormat", "load_into", "open_checkpoint", "read_weights", "write_checkpoint"]
