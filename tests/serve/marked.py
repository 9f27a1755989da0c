"""A tiny model whose tokenizer knows DeepSeek's marks of thought and of calls, and whose template has a switch."""

from __future__ import annotations

import json

from benthic.inference.pretrained import save_model
from benthic.text import Tokenizer, train_tokenizer
from benthic.text.tool_format import V31
from tests.model.configs import CONFIGS, randomised, tiny

MARKS = ("<think>", "</think>", V31.begin, V31.end, V31.call_begin, V31.call_end, "<｜tool▁sep｜>")
TEMPLATES = {
    "V3.1": "{{ bos_token }}{% if tools %}## Tools {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<｜User｜>{{ m['content'] }}"
    "{% if m['tool_calls'] %}<｜tool▁calls▁begin｜>{{ m['tool_calls'] | length }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}",
}
TEMPLATES["V3"] = TEMPLATES["V3.1"] + "{# ```json #}"


def trained_tokenizer():
    return train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)


END_OF_THOUGHT, BEGIN_CALLS = (
    str(trained_tokenizer().vocab_size + MARKS.index(one)) for one in ("</think>", V31.begin)
)


def save_marked(path, template, positions=4096):
    """A model whose tokenizer knows the marks of thought and of calls."""
    trained = trained_tokenizer()
    definition = json.loads(trained.definition)
    row = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    definition["added_tokens"] += [
        {"id": trained.vocab_size + place, "content": mark, **row} for place, mark in enumerate(MARKS)
    ]
    tokenizer = Tokenizer(json.dumps(definition), trained.config, {"default": TEMPLATES[template]})
    config = tiny(
        **CONFIGS["v3"],
        vocab_size=tokenizer.vocab_size,
        dtype="float32",
        max_position_embeddings=positions,
        eos_token_id=1,
    )
    save_model(randomised(config), path, weights="fp32")
    tokenizer.save(path)
