from __future__ import annotations

import openai
import pytest

from benthic.inference.pretrained import save_model
from benthic.text import train_tokenizer
from tests.model.configs import CONFIGS, randomised, tiny
from tests.serve.marked import save_marked
from tests.serve.running import RunningServer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model with a prediction layer, room for 2048 tokens, and a chat template."""
    path = tmp_path_factory.mktemp("served")
    tokenizer = train_tokenizer(["def add(first, second):\n    return first + second\n" * 20], 300)
    config = tiny(
        **CONFIGS["v3"], vocab_size=tokenizer.vocab_size, dtype="float32", max_position_embeddings=2048, eos_token_id=1
    )
    save_model(randomised(config), path, weights="fp32")
    tokenizer.save(path)
    return path


@pytest.fixture(scope="session")
def start(folder, tmp_path_factory):
    """Starts servers, and ends them all."""
    made = []

    def start(*options, model=None):
        log = tmp_path_factory.mktemp("log") / "server.log"
        made.append(RunningServer(model or folder, "--num-blocks", "64", *options, log=log))
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture(scope="session")
def server(start):
    """One for all tests that leave it as they found it."""
    return start(
        "--limits.send-seconds", "2", "--limits.body-seconds", "2", "--limits.header-seconds", "2"
    ).wait_until_ready()


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client, which checks every answer's shape."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    ) as one:
        yield one


@pytest.fixture(scope="session")
def marked(start, tmp_path_factory):
    """Clients of servers, one a form of tool calls, whose models know marks of thought and calls, and draft."""
    clients = {}

    def client(form):
        if form not in clients:
            path = tmp_path_factory.mktemp("marked")
            save_marked(path, form)
            url = f"{start('--speculative', model=path).wait_until_ready().url}/v1"
            clients[form] = openai.OpenAI(
                base_url=url, api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
            )
        return clients[form]

    yield client
    for one in clients.values():
        one.close()


@pytest.fixture(scope="session")
def lenient(client):
    """The same without the check: its types have no null in token_logprobs and finish_reason, which OpenAI sends."""
    with openai.OpenAI(base_url=client.base_url, api_key="none", max_retries=0, timeout=60) as one:
        yield one
