"""Floor 5: text to batches of tokens."""

from benthic.data.compression import Compression, compress
from benthic.data.dataset import Dataset
from benthic.data.loader import Loader, validation_batches
from benthic.data.packing import Batch
from benthic.data.preparation import prepare

__all__ = ["Batch", "Compression", "Dataset", "Loader", "compress", "prepare", "validation_batches"]
