"""What is held out."""

from benthic.data.sources import Document
from benthic.data.splits import FEW, split


def corpus(count):
    return [Document(f"module_{index}.py", f"text {index}\n" * 3) for index in range(count)]


def test_the_hash_of_the_name_decides():
    found = {document.name: which for which, document in split(corpus(2000), 0.1)}
    share = sum(which == "validation" for which in found.values()) / 2000
    assert 0.07 < share < 0.13
    again = {document.name: which for which, document in split(reversed(corpus(2000)), 0.1)}
    assert again == found


def test_a_growing_corpus_keeps_its_split():
    found = {document.name: which for which, document in split(corpus(100), 0.2)}
    more = {document.name: which for which, document in split(corpus(300), 0.2)}
    assert found.items() <= more.items()


def test_duplicates_and_empty_documents_are_left_out():
    documents = [Document("copy.py", "text 0\n" * 3), Document("empty.py", " \n"), *corpus(30)]
    names = [document.name for _, document in split(documents, 0.5)]
    assert len(names) == 30
    assert "copy.py" in names
    assert "module_0.py" not in names


def test_a_few_documents_each_give_their_end_at_a_line():
    text = "".join(f"line {index}\n" for index in range(100))
    parts = list(split([Document("all.txt", text)], 0.1))
    assert [which for which, _ in parts] == ["train", "validation"]
    train, held = (document.text for _, document in parts)
    assert train + held == text
    assert train.endswith("\n")
    assert 0.08 < len(held) / len(text) < 0.13
    assert len(list(split(corpus(FEW - 1), 0.1))) == 2 * (FEW - 1)
    assert len(list(split(corpus(FEW), 0.1))) == FEW


def test_a_text_of_one_line_is_cut_inside_it():
    train, held = (document.text for _, document in split([Document("a", "x" * 100)], 0.1))
    assert (len(train), len(held)) == (90, 10)
