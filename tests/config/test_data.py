"""DataConfig refuses what cannot be meant."""

import pytest

from benthic.config.data import DataConfig
from benthic.errors import ConfigError


def test_defaults_are_the_standard_library():
    assert DataConfig().source == "stdlib"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "folder"}, "source 'folder' needs a path"),
        ({"source": "stdlib", "path": "x"}, "source 'stdlib' takes no path"),
        ({"source": "stdlibb"}, "source: Input should be 'stdlib', 'folder'"),
        ({"fim_rate": 1.5}, r"fim_rate: .*less than or equal to 1 \(given 1.5\)"),
        ({"validation_fraction": 0}, "validation_fraction: .*greater than 0"),
        ({"sequence_length": 0}, "sequence_length: .*greater than or equal to 1"),
        ({"vocab_size": 100}, "vocab_size: .*greater than or equal to 264"),
        ({"sequence_lenght": 3}, "unknown key 'sequence_lenght' in DataConfig\nhint: did you mean 'sequence_length'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**values)
