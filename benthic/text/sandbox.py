"""The sandbox a chat template runs in: jinja's immutable one, with a budget.

The globals are those transformers gives a template. A turn of a loop is a step, a call CALL_STEPS, and a rendering has
MAX_STEPS of them and MAX_CHARACTERS of output, so that a template cannot keep a server busy for ever. What one step may
allocate is bounded for `*` and `**` only; a server that runs strangers' templates wants a memory limit of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from benthic.errors import BenthicError, RequestError, TextError

MAX_STEPS = 1_000_000
CALL_STEPS = 20
MAX_CHARACTERS = 64_000_000


def compile_template(source: str, origin: str) -> jinja2.Template:
    """The template ready to run, its loops counted. Raises TextError with the line of a syntax error."""
    try:
        return _ENVIRONMENT.from_string(_bounded(_ENVIRONMENT.parse(source)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise TextError(f"chat template of {origin} does not compile: {_reason(error)}") from None


def names_read(source: str) -> frozenset[str]:
    """The variables that a template which compiles reads from outside, its own globals aside."""
    return frozenset(jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source)) - _ENVIRONMENT.globals.keys())


def run_template(template: jinja2.Template, context: Mapping[str, Any], origin: str) -> str:
    """What the template writes. RequestError: it refused its input; TextError: it failed or went past its budget."""
    budget = _STEPS_LEFT.set([MAX_STEPS])
    try:
        return _collect(template.generate(context))
    except BenthicError:
        raise
    except Exception as error:  # a template is a program: whatever it raises is its own failure
        raise TextError(f"chat template of {origin} failed: {_reason(error)}") from None
    finally:
        _STEPS_LEFT.reset(budget)


def _collect(pieces: Iterator[str]) -> str:
    kept, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise TextError(f"chat template wrote more than {MAX_CHARACTERS} characters")
        kept.append(piece)
    return "".join(kept)


def _reason(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


_STEPS_LEFT: ContextVar[list[int]] = ContextVar("steps left to the template being rendered")


def _spend(steps: int) -> None:
    left = _STEPS_LEFT.get()
    left[0] -= steps
    if left[0] < 0:
        raise TextError(f"chat template ran more than {MAX_STEPS} steps", hint="it may loop without end; do not use it")


class _Counted:
    """What a `for` of the template walks over; each turn is a step. Keeps `len`, which `loop.length` reads."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _spend(1)
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _CountSteps(jinja2.ext.Extension):
    def counted(self, items: Any) -> _Counted:
        return _Counted(items)


def _bounded(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """Wrap what each loop walks over, out of the template's reach."""
    for loop in list(tree.find_all(jinja2.nodes.For)):
        wrap = jinja2.nodes.ExtensionAttribute(_CountSteps.identifier, "counted")
        loop.iter = jinja2.nodes.Call(wrap, [loop.iter], [], None, None).set_lineno(loop.lineno)
    tree.set_environment(_ENVIRONMENT)
    return tree


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for trainers; when rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (an instance variable in the base class)

    def parse(self, parser: Any) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox that also counts calls and refuses to build huge values by `*` and `**`."""

    intercepted_binops = frozenset(["*", "**"])

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(CALL_STEPS)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        numbers = [abs(side) for side in (left, right) if isinstance(side, int | float)]
        huge = operator == "**" and any(side > 1000 for side in numbers)
        if huge or (sizes and numbers and sizes[0] * numbers[0] > MAX_STEPS):
            raise jinja2.sandbox.SecurityError(f"operator {operator} would build a huge value")
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore (the door to Python's internals)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise_exception(message: str) -> None:
    raise RequestError(f"the chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without jinja's escaping of HTML, as transformers does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Sandbox:
    made = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_CountSteps, _Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    names: dict[str, Any] = {
        "cycler": jinja2.utils.Cycler,
        "joiner": jinja2.utils.Joiner,
        "range": jinja2.sandbox.safe_range,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    made.globals = names
    return made


_ENVIRONMENT = _environment()
