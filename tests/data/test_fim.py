"""Fill in the middle: prefix, suffix, middle, and the same ones every time."""

from hypothesis import given
from hypothesis import strategies as st

from benthic.data.fim import arranged, pieces
from benthic.data.sources import Document


@given(st.text(), st.text(), st.integers(0, 2**40))
def test_the_pieces_are_the_document_and_repeat(name, text, seed):
    found = pieces(Document(name, text), 1.0, seed)
    assert found is not None
    assert found.prefix + found.middle + found.suffix == text
    assert found == pieces(Document(name, text), 1.0, seed)


def test_the_rate_is_kept_and_depends_on_name_and_seed():
    documents = [Document(f"{index}.py", "some text") for index in range(3000)]
    chosen = [pieces(one, 0.1, 0) is not None for one in documents]
    assert 0.08 < sum(chosen) / 3000 < 0.12
    assert chosen != [pieces(one, 0.1, 1) is not None for one in documents]
    assert not any(pieces(one, 0.0, 0) for one in documents)


def test_the_order_is_prefix_suffix_middle():
    assert arranged([1, 2], [3], [4, 5], (90, 91, 92)) == [[90], [1, 2], [91], [4, 5], [92], [3]]
