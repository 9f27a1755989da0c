"""litellm with `benthic serve`: python examples/litellm_client.py MODEL [http://127.0.0.1:8000/v1]

Needs the litellm package; MODEL is the server's name of its model. The price list that comes with the package is used,
so that nothing but the server is asked.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm


def main(model: str, url: str) -> None:
    """A chat and a stream."""
    server = {"model": f"openai/{model}", "api_base": url, "api_key": os.environ.get("OPENAI_API_KEY", "none")}
    messages = [{"role": "user", "content": "Write a function that adds two numbers."}]
    answer = litellm.completion(**server, messages=messages, max_tokens=32)
    print("chat:", answer.choices[0].message.content)
    print("stream: ", end="")
    for chunk in litellm.completion(**server, messages=messages, max_tokens=32, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1")
