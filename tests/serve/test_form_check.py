"""What is remembered of a form is what was found out about it."""

from __future__ import annotations

import asyncio

import pytest

from benthic.serve import form_check
from benthic.serve.form_check import FormCheck
from benthic.serve.refusal import Refusal
from benthic.serve.sampling import Form

FORM = Form("regex", "[0-9]+", "structured_outputs.regex")


def test_a_form_that_took_too_long_once_is_asked_about_again():
    async def ask() -> None:
        forms = FormCheck(seconds=1e-9)
        try:
            with pytest.raises(Refusal, match="takes more than"):
                await forms.check(FORM)
            forms._seconds = 60.0
            await forms.check(FORM)
        finally:
            await forms.close()

    asyncio.run(ask())


def test_a_compiler_that_does_not_start_is_no_fault_of_the_form(monkeypatch):
    async def ask() -> None:
        forms = FormCheck(seconds=60.0)
        with monkeypatch.context() as broken:
            broken.setattr(form_check.sys, "executable", "/nowhere/python")
            with pytest.raises(Refusal, match="did not start") as caught:
                await forms.check(FORM)
        assert caught.value.status == 503
        try:
            await forms.check(FORM)
        finally:
            await forms.close()

    asyncio.run(ask())
