"""Whether a model thinks before it answers: what a client says of it becomes the variables of the chat template."""

from __future__ import annotations

from benthic.serve.refusal import wrong
from benthic.serve.requests import Effort, TemplateArguments
from benthic.text import Tokenizer

SWITCHES = ("thinking", "enable_thinking")


def thinking_of(
    tokenizer: Tokenizer, effort: Effort | None, given: TemplateArguments | None = None, param: str = "reasoning_effort"
) -> dict[str, bool]:
    """The variables to render with. These models think or they do not: every effort but "none" lets them.

    Raises Refusal 400 for what the template does not read.
    """
    template = tokenizer.chat_template() if tokenizer.templates else None
    known = [name for name in SWITCHES if template is not None and name in template.variables]
    variables = given.model_dump(exclude_none=True) if given is not None else {}
    for name in variables:
        if name not in known:
            raise wrong(
                f"the chat template of this model does not read {name}",
                f"chat_template_kwargs.{name}",
                "unsupported_parameter",
            )
    if effort is None:
        return variables
    if not known:
        raise wrong(
            "the chat template of this model has no switch for thinking (thinking or enable_thinking)",
            param,
            "unsupported_parameter",
        )
    thinks = effort != "none"
    if not all(value is thinks for value in variables.values()):
        raise wrong(f"{param} is {effort!r}, and chat_template_kwargs say otherwise", param, "invalid_value")
    return dict.fromkeys(known, thinks)
