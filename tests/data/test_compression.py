"""The yardstick beside the loss."""

import lzma
import random
import zlib

import pytest

from benthic.data import compress
from benthic.errors import DataError

HELD = "".join(f"value_{index} = {index * 37}\n" for index in range(300)).encode()


def test_each_number_is_what_its_compressor_writes():
    found = compress(HELD)
    assert found.zlib_alone == len(zlib.compress(HELD, 9)) * 8 / len(HELD)
    # xz's default preset, and within a percent of its strongest.
    assert found.xz_alone == pytest.approx(len(lzma.compress(HELD)) * 8 / len(HELD), rel=1e-3)
    strongest = len(lzma.compress(HELD, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(HELD)
    assert found.xz_alone == pytest.approx(strongest, rel=0.01)
    assert (found.held_out_bytes, found.xz_after_training_text, found.training_bytes) == (len(HELD), None, 0)


def test_text_that_was_read_before_costs_almost_nothing():
    found = compress(HELD, HELD)
    assert found.xz_after_training_text < found.xz_alone / 10
    assert found.training_bytes == len(HELD)


def test_training_text_of_another_kind_does_not_help():
    noise = random.Random(0).randbytes(20_000)
    found = compress(HELD, noise)
    assert 0.8 * found.xz_alone < found.xz_after_training_text < 1.5 * found.xz_alone


def test_no_text_is_refused():
    with pytest.raises(DataError, match="no held-out text"):
        compress(b"")
