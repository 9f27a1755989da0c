"""The addresses beside those of OpenAI's client."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benthic.config.serve import ServeConfig
from benthic.serve.app import ENDPOINTS
from benthic.serve.openapi import openapi
from benthic.text import Tokenizer
from tests.model.configs import CONFIGS, tiny

CONFIG = tiny(**CONFIGS["v3"])
EXPERTS, CHOSEN = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok


def get(server, path):
    with urllib.request.urlopen(f"{server.url}{path}", timeout=30) as response:
        return response.read().decode()


def post(server, path, **body):
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"content-type": "application/json", "x-request-id": "my-1"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["x-request-id"] == "my-1"
        return json.load(response)


def test_tokens_and_back(server, folder):
    tokenizer = Tokenizer.from_folder(folder)
    answer = post(server, "/tokenize", prompt="def add é", return_token_strs=True)
    assert answer["tokens"] == tokenizer.encode("def add é", add_bos=True)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 2048
    assert post(server, "/detokenize", tokens=answer["tokens"][1:]) == {"prompt": "def add é"}
    messages = [{"role": "user", "content": "<｜Assistant｜>"}]
    answer = post(server, "/tokenize", messages=messages)
    assert answer["tokens"] == tokenizer.encode_chat(messages, add_generation_prompt=True)


def test_metrics_are_prometheus_s_and_count(server):
    before = server.metric("vllm:generation_tokens_total")
    post(server, "/v1/completions", prompt="def", max_tokens=7, ignore_eos=True)
    server.wait_for(lambda: server.metric("vllm:generation_tokens_total") == before + 7)
    names = {family.name for family in text_string_to_metric_families(get(server, "/metrics"))}
    assert {"vllm:num_requests_running", "vllm:time_to_first_token_seconds", "vllm:request_success"} <= names


def test_metrics_tell_the_load_of_experts_by_layer_the_cache_and_the_drafts(server):
    post(server, "/v1/completions", prompt=["def", "add"], max_tokens=200, ignore_eos=True)
    server.wait_for(lambda: server.metric("benthic:expert_load_max_over_mean") > 0)
    families = {family.name: family for family in text_string_to_metric_families(get(server, "/metrics"))}
    loads = families["benthic:expert_load_max_over_mean"].samples
    layers = [sample.labels["layer"] for sample in loads]
    assert layers == [sample.labels["layer"] for sample in families["benthic:experts_unused"].samples] != []
    assert all(1 <= sample.value <= EXPERTS / CHOSEN for sample in loads)
    assert {"vllm:kv_cache_usage_perc", "vllm:spec_decode_num_accepted_tokens", "vllm:prefix_cache_hits"} <= set(
        families
    )


def test_health_tells_the_age_of_the_engine_s_last_word(server):
    status, body = server.health()
    assert status == 200
    assert body["status"] == "ok"
    assert 0 <= body["engine_silence_seconds"] < 10


def test_the_description_names_what_there_is_and_every_reference_resolves(server):
    text = get(server, "/openapi.json")
    description = json.loads(text)
    assert description["openapi"] == "3.1.0"
    hidden = {path for _, path in ENDPOINTS if path.startswith("/v1/responses/")}
    known = {path.replace(":path", "") for _, path in ENDPOINTS} - {"/v1/embeddings"} - hidden
    assert set(description["paths"]) == known
    schemas = description["components"]["schemas"]
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["Answer.ChatCompletion"]["additionalProperties"] is False
    assert "securitySchemes" not in description["components"]


def test_a_server_with_keys_describes_what_needs_one():
    description = openapi(ServeConfig(model_name="x", key_digests=(b"x",)))
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert operation["security"] == ([] if path == "/health" else [{"key": []}])
            assert ("401" in operation["responses"]) == (path != "/health")


def test_no_header_opens_the_server_to_other_pages(server):
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", method="OPTIONS", headers={"origin": "http://evil.example"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    with caught.value as error:
        assert error.code == 405
        assert not [name for name in error.headers if name.startswith("access-control")]
