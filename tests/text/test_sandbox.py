"""A template is somebody else's program: what it tries, and what it gets."""

import time

import pytest

from benthic.errors import TextError
from benthic.text import ChatTemplate

CHAT = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a global": "{{ raise_exception.__globals__['json'] }}",
    "globals by filter": "{{ (raise_exception | attr('__globals__'))['json'] }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__['os'] }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "namespace": "{% set n = namespace(__class__=1) %}",
    "namespace by set": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__['os'] }}",
    "mutation of a list": "{{ messages.append(1) }}",
    "mutation of an object": "{{ messages[0].update(a=1) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES.keys())
def test_the_sandbox_holds(source):
    chat = [dict(message) for message in CHAT]
    with pytest.raises(TextError, match="failed"):
        ChatTemplate(source).render(chat)
    assert chat == CHAT


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in messages recursive %}{% if loop.depth < 40 %}{{ loop(messages) }}{% endif %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for a in range(99999) if not range(99999) | list | sum == 1 %}"
        "{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_would_never_end_is_stopped(source):
    with pytest.raises(TextError, match="ran more than 1000000 steps"):
        ChatTemplate(source).render(CHAT)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ 'a' * 10**9 }}", r"operator \* would build a huge value"),
        ("{{ 10**9 * [1] }}", r"operator \* would build a huge value"),
        ("{{ 9 ** 999999999 }}", r"operator \*\* would build a huge value"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_huge_values_are_refused(source, message):
    with pytest.raises(TextError, match=message):
        ChatTemplate(source).render(CHAT)


def test_output_is_bounded(monkeypatch):
    monkeypatch.setattr("benthic.text.sandbox.MAX_CHARACTERS", 1000)
    with pytest.raises(TextError, match="wrote more than 1000 characters"):
        ChatTemplate("{% for a in range(99) %}{{ 'some more text' }}{% endfor %}").render(CHAT)


def test_ordinary_arithmetic_and_loops_are_not_disturbed():
    source = (
        "{{ 3 * 4 }} {{ 2 ** 5 }} {{ '-' * 3 }}"
        "{% for k, v in {'a': 1}.items() %} {{ loop.last }}{{ k }}{{ v }}{% endfor %}"
    )
    assert ChatTemplate(source).render(CHAT) == "12 32 --- Truea1"


def test_the_date_can_be_asked_for():
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(CHAT) == time.strftime("%Y")
