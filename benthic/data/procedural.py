"""Text the project writes itself: small tasks with one right answer, the same bytes on every machine.

Tests and continuous integration learn from it, and so does a machine whose Python carries no source. A document is some
forty lines of one task, so that experts have something to divide among themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benthic.data.splitmix import Draws

_LINES = 40
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def documents(size: int, seed: int) -> Iterator[tuple[str, str]]:
    """(name, text) of at least `size` bytes in all, decided by `seed` alone."""
    names, written, index = list(TASKS), 0, 0
    while written < size:
        task = names[index % len(names)]
        draws = Draws(seed, index)
        text = "".join(TASKS[task](draws) + "\n" for _ in range(_LINES))
        yield f"{task}/{index}", text
        written += len(text.encode())
        index += 1


def _arithmetic(draws: Draws) -> str:
    left, right = draws.below(10 ** draws.between(1, 3)), draws.below(10 ** draws.between(1, 3))
    sign = draws.choice("+-*")
    answer = {"+": left + right, "-": left - right, "*": left * right}[sign]
    return f"{left} {sign} {right} = {answer}"


def _word(draws: Draws) -> str:
    return "".join(draws.choice(_LETTERS) for _ in range(draws.between(1, 5)))


def _copying(draws: Draws) -> str:
    words = " ".join(_word(draws) for _ in range(draws.between(2, 6)))
    return f"copy {words} -> {words}"


def _sorting(draws: Draws) -> str:
    numbers = [draws.below(100) for _ in range(draws.between(2, 7))]
    return f"sort {' '.join(map(str, numbers))} -> {' '.join(map(str, sorted(numbers)))}"


def _brackets(draws: Draws) -> str:
    written, open_ones = [], []
    for _ in range(draws.between(2, 9)):
        if open_ones and draws.below(2):
            written.append(_PAIRS[open_ones.pop()])
        else:
            open_ones.append(draws.choice("([{"))
            written.append(open_ones[-1])
    closing = "".join(_PAIRS[one] for one in reversed(open_ones))
    return f"close {''.join(written)} -> {closing or 'nothing'}"


def _recall(draws: Draws) -> str:
    names = draws.shuffled(_LETTERS)[: draws.between(2, 6)]
    values = {name: draws.below(100) for name in names}
    asked = draws.choice(names)
    return f"given {', '.join(f'{name}={value}' for name, value in values.items())} then {asked} = {values[asked]}"


def _code(draws: Draws) -> str:
    name, number, argument = _word(draws), draws.between(1, 9), draws.between(0, 20)
    sign, verb = draws.choice([("+", "add"), ("-", "take"), ("*", "times")])
    result = {"+": argument + number, "-": argument - number, "*": argument * number}[sign]
    return f"def {verb}_{name}(x):\n    return x {sign} {number}\n\n\nassert {verb}_{name}({argument}) == {result}\n\n"


TASKS: dict[str, Callable[[Draws], str]] = {
    "arithmetic": _arithmetic,
    "copying": _copying,
    "sorting": _sorting,
    "brackets": _brackets,
    "recall": _recall,
    "code": _code,
}
