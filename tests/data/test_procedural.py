"""Text the project writes: right, and the same everywhere."""

import hashlib
import re

from benthic.data.procedural import TASKS, documents


def lines(task, size=30_000):
    return [line for name, text in documents(size, 0) if name.startswith(task) for line in text.splitlines() if line]


def test_the_bytes_never_change():
    whole = "".join(name + text for name, text in documents(20_000, 0))
    assert (
        hashlib.sha256(whole.encode()).hexdigest() == "de5e7b3468d42036ce07f4245c66bc99134d3b263d76894b0e89fe4a3aeeccd6"
    )


def test_size_and_seed_are_kept():
    assert sum(len(text.encode()) for _, text in documents(10_000, 1)) >= 10_000
    assert list(documents(5_000, 1)) != list(documents(5_000, 2))
    longer = list(documents(9_000, 1))
    assert longer[: len(list(documents(5_000, 1)))] == list(documents(5_000, 1))


def test_every_task_appears():
    assert {name.split("/")[0] for name, _ in documents(20_000, 0)} == set(TASKS)


def test_arithmetic_is_right():
    for line in lines("arithmetic"):
        left, right = line.split(" = ")
        assert eval(left, {}) == int(right)


def test_code_runs():
    for name, text in documents(30_000, 0):
        if name.startswith("code"):
            exec(text, {})


def test_sorting_and_copying_are_right():
    for line in lines("sorting"):
        given, answer = line.removeprefix("sort ").split(" -> ")
        assert sorted(given.split(), key=int) == answer.split()
    for line in lines("copying"):
        given, answer = line.removeprefix("copy ").split(" -> ")
        assert given == answer


def test_brackets_close():
    for line in lines("brackets"):
        opened, closing = line.removeprefix("close ").split(" -> ")
        text = opened + closing.replace("nothing", "")
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
            text = shorter
        assert text == ""


def test_recall_is_right():
    for line in lines("recall"):
        given, asked = line.removeprefix("given ").split(" then ")
        assert asked.replace(" ", "") in given.split(", ")
