"""How models of this family write tool calls, and which of the ways a chat template teaches.

DeepSeek-V3 and R1 fence the arguments, V3.1 does not; Kimi-K2 numbers its calls. Bars are U+FF5C, blocks U+2581.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Calls stand between `begin` and `end`; each is call_begin, a header, `opening`, JSON arguments, one of `closings`
    (the first is the proper one). A header is `prefix`, the function's name, and what `numbers` says behind it."""

    name: str
    begin: str
    call_begin: str
    prefix: str
    opening: str
    closings: tuple[str, ...]
    between: str
    end: str
    numbers: bool = False

    @property
    def call_end(self) -> str:
        """What ends a call, whatever stands around its arguments."""
        return self.closings[-1]

    def header(self, function: str, number: int) -> str:
        """What stands before the arguments of call `number`."""
        return f"{self.prefix}{function}:{number}" if self.numbers else f"{self.prefix}{function}"

    def function_of(self, header: str) -> str | None:
        """The function that a header names; None where it is not a header."""
        function = header.strip()
        if self.numbers:
            function = function.removeprefix(self.prefix).partition(":")[0]
        elif self.prefix:
            # R1 writes other types than "function" at times; what stands behind the separator is the name.
            _, found, function = function.rpartition(_SEPARATOR)
            if not found:
                return None
        function = function.strip()
        return (
            function
            if function and not any(character.isspace() or character == "<" for character in function)
            else None
        )


_BEGIN, _END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL_BEGIN, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

V3 = ToolFormat(
    "deepseek-v3",
    _BEGIN,
    _CALL_BEGIN,
    "function" + _SEPARATOR,
    "\n```json\n",
    ("\n```" + _CALL_END, "```" + _CALL_END, _CALL_END),
    "\n",
    _END,
)
V31 = ToolFormat("deepseek-v3.1", _BEGIN, _CALL_BEGIN, "", _SEPARATOR, (_CALL_END,), "", _END)
KIMI = ToolFormat(
    "kimi-k2",
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "functions.",
    "<|tool_call_argument_begin|>",
    ("<|tool_call_end|>",),
    "",
    "<|tool_calls_section_end|>",
    numbers=True,
)


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template shows its model; None where it takes no tools."""
    if "tools" not in template:
        return None
    if KIMI.begin in template:
        return KIMI
    if V3.begin not in template:
        return None
    return V3 if "```json" in template else V31
