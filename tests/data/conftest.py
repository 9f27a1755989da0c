import numpy as np
import pytest

from benthic.config.data import DataConfig
from benthic.data import Dataset, prepare
from benthic.data.tokens import SplitFacts, TokenFile


@pytest.fixture(scope="session")
def procedural_config() -> DataConfig:
    return DataConfig(source="procedural", procedural_bytes=60_000, vocab_size=300, sequence_length=16)


@pytest.fixture(scope="session")
def dataset(procedural_config, tmp_path_factory) -> Dataset:
    return prepare(procedural_config, tmp_path_factory.mktemp("procedural"))


@pytest.fixture(scope="session")
def stream(tmp_path_factory):
    """Makes a token file whose ids are 0, 1, 2 ... and whose documents have the given lengths."""
    root = tmp_path_factory.mktemp("streams")

    def make(*lengths: int) -> TokenFile:
        folder = root / "-".join(map(str, lengths))
        folder.mkdir(exist_ok=True)
        tokens = sum(lengths)
        np.arange(tokens, dtype="<u2").tofile(folder / "train.bin")
        np.cumsum([0, *lengths], dtype="<i8").tofile(folder / "train.idx")
        facts = SplitFacts(tokens=tokens, documents=len(lengths), text_bytes=tokens, dtype="<u2", sha256="")
        return TokenFile.open(folder, "train", facts)

    return make
