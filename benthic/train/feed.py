"""Batches of a run, each read while the update before it is still being computed."""

from __future__ import annotations

from benthic.config.train import TrainConfig
from benthic.data import Batch, Loader
from benthic.train.schedule import Place, sequences_at


class Feed:
    """A loader one batch ahead. `state` is where the loader was after the last batch that was given out, so that what
    was read ahead is read again by a resumed run."""

    def __init__(self, loader: Loader, config: TrainConfig) -> None:
        self._loader, self._config = loader, config
        self._ahead: Batch | None = None
        self.state = loader.state_dict()

    def restore(self, state: dict[str, int]) -> None:
        """Continue at a `state`."""
        self._loader.load_state_dict(state)
        self._ahead, self.state = None, self._loader.state_dict()

    def next_batch(self, place: Place) -> Batch:
        """The batch of the update at `place`."""
        batch = self._ahead if self._ahead is not None else self._read(place)
        self._ahead, self.state = None, self._loader.state_dict()
        return batch

    def read_ahead(self, place: Place) -> None:
        """Read the batch of the update at `place`, the next one, unless the run ends before it."""
        if place.step <= self._config.steps:
            self._ahead = self._read(place)

    def _read(self, place: Place) -> Batch:
        batch = self._config.batch
        return self._loader.next_batch(sequences_at(batch.sequences, batch.micro_sequences, place))
