"""What is held out."""

from benthic.data.sources import Document
from benthic.data.splits import split


def corpus(count):
    return [Document(f"module_{index}.py", f"text {index}\n" * 3) for index in range(count)]


def held_out(documents, fraction):
    return {document.name: which for which, document in split(lambda: documents, fraction)}


def test_the_hash_of_the_name_decides():
    found = held_out(corpus(2000), 0.1)
    assert 0.07 < sum(which == "validation" for which in found.values()) / 2000 < 0.13
    assert held_out(corpus(2000)[::-1], 0.1) == found


def test_a_growing_corpus_keeps_its_split():
    assert held_out(corpus(100), 0.2).items() <= held_out(corpus(300), 0.2).items()


def test_duplicates_and_empty_documents_are_left_out():
    documents = [Document("copy.py", "text 0\n" * 3), Document("empty.py", " \n"), *corpus(30)]
    found = held_out(documents, 0.5)
    assert len(found) == 30
    assert "copy.py" in found
    assert "module_0.py" not in found


def test_a_few_documents_each_give_their_end_at_a_line():
    text = "".join(f"line {index}\n" for index in range(100))
    parts = list(split(lambda: [Document("all.txt", text)], 0.1))
    assert [(which, document.name) for which, document in parts] == [
        ("train", "all.txt"),
        ("validation", "all.txt (end)"),
    ]
    train, held = (document.text for _, document in parts)
    assert train + held == text
    assert train.endswith("\n")
    assert 0.08 < len(held) / len(text) < 0.13


def test_documents_stay_whole_where_eight_of_them_may_be_held_out():
    assert len(held_out(corpus(79), 0.1)) == 2 * 79
    assert len(held_out(corpus(80), 0.1)) == 80


def test_a_text_of_one_line_is_cut_inside_it():
    train, held = (document.text for _, document in split(lambda: [Document("a", "x" * 100)], 0.1))
    assert (len(train), len(held)) == (90, 10)
