from __future__ import annotations

import pytest

from benthic.text.tool_format import KIMI, V3, V31


@pytest.mark.parametrize("format_", [V3, V31, KIMI], ids=lambda one: one.name)
@pytest.mark.parametrize("function", ["now", "files.read", "functions.now", "a-b_c.d.s.e"])
def test_a_header_names_the_function_that_it_was_written_for(format_, function):
    assert format_.function_of(format_.header(function, 3)) == function
    assert format_.function_of(f" {format_.header(function, 3)}\n") == function
