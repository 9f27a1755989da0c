"""What the server's process and the engine's say to each other: typed msgpack, never pickle.

A message travels as its length in four bytes and its content. Content of another type or length ends the connection.
"""

from __future__ import annotations

from typing import Any

import msgspec

LENGTH_BYTES = 4
MAX_BYTES = 2**28


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fields of SamplingParams that a request of the server can set, under the same names."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None


class Start(msgspec.Struct, frozen=True, tag="start"):
    """The first message: which engine. `settings` are EngineConfig's."""

    folder: str
    device: str = "cpu"
    dtype: str | None = None
    speculative: bool = False
    settings: dict[str, Any] = {}


class Add(msgspec.Struct, frozen=True, tag="add"):
    """A prompt to answer, sampling.n times. `request` is the server's number for it; see Engine.add_request for the
    rest."""

    request: int
    prompt: list[int]
    sampling: Sampling
    salt: str

    @property
    def owner(self) -> str:
        """Whose key the request came with: a salt begins with that, and who makes up more salts gets no larger share
        of the cache."""
        return self.salt.partition(":")[0]


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for the answers of `request` any more; Cancelled comes back."""

    request: int


Order = Start | Add | Cancel


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The model is loaded. Texts have at most `positions` tokens, each `token_bytes` of cache; `dtype` is that of the
    weights, or both where some are in float8."""

    vocabulary: int
    positions: int
    blocks: int
    block_size: int
    drafts: int
    max_sequences: int
    device: str
    dtype: str
    load_seconds: float
    weight_bytes: int
    token_bytes: int

    @property
    def longest(self) -> int:
        """Most tokens of a prompt and its answer together, by the model's positions and the cache's size."""
        return min(self.positions, self.blocks * self.block_size - self.drafts)


class Added(msgspec.Struct, frozen=True, tag="added"):
    """The answers of `request` are on their way."""

    request: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """`request` cannot be served, now (`is_full`) or ever."""

    request: int
    message: str
    is_full: bool = False


class Finish(msgspec.Struct, frozen=True):
    """How one answer ended; see Completion."""

    reason: str
    error: str | None = None
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class PromptLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's tokens; nothing predicts the first."""

    chosen: list[float | None]
    alternatives: list[dict[int, float] | None]


class Delta(msgspec.Struct, frozen=True):
    """What one step added to answer `index` of `request`. `alternatives` are there where more than the token's own
    log-probability was asked for."""

    request: int
    index: int
    token_ids: list[int]
    text: str
    logprobs: list[float] | None = None
    alternatives: list[dict[int, float]] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    finish: Finish | None = None

    @property
    def bytes_held(self) -> int:
        """About what it takes in memory: 400 bytes, 64 a token, and 100 for each alternative."""
        size = 400 + 64 * len(self.token_ids)
        if self.alternatives:
            size += 100 * sum(map(len, self.alternatives))
        if self.prompt_logprobs is not None:
            size += 64 * len(self.prompt_logprobs.chosen)
            size += 100 * sum(len(one) for one in self.prompt_logprobs.alternatives if one)
        return size


class Counts(msgspec.Struct, frozen=True):
    """Statistics of the engine; see benthic.inference.statistics."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    waiting: int = 0
    running: int = 0
    blocks: int = 0
    free_blocks: int = 0


class Step(msgspec.Struct, frozen=True, tag="step"):
    """What a step added to all answers. One without any says that the engine is alive and idle."""

    deltas: list[Delta]
    counts: Counts


class LayerLoad(msgspec.Struct, frozen=True):
    """How a layer's experts are used; see benthic.inference.expert_load."""

    layer: int
    max_over_mean: float
    unused: int


class Loads(msgspec.Struct, frozen=True, tag="loads"):
    """How the experts of all layers were used since the last of these."""

    layers: list[LayerLoad]


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """No more comes for `request`, and its blocks are free."""

    request: int


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine's last words. `is_mistake`: what it was started with is wrong, so another start would fail too."""

    message: str
    hint: str | None = None
    is_mistake: bool = False


Report = Ready | Added | Refused | Step | Loads | Cancelled | Fatal

read_order = msgspec.msgpack.Decoder(Order).decode
read_report = msgspec.msgpack.Decoder(Report).decode
_encode = msgspec.msgpack.Encoder().encode


def packed(message: Order | Report) -> bytes:
    """A message as it travels."""
    content = _encode(message)
    assert len(content) <= MAX_BYTES, f"a message of {len(content)} bytes"
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


def length_of(head: bytes) -> int:
    """How long the content behind `head` is; ConnectionError beyond what any message can be."""
    length = int.from_bytes(head, "big")
    if length > MAX_BYTES:
        raise ConnectionError(f"a message of {length} bytes; at most {MAX_BYTES} are allowed")
    return length
