"""ServeConfig: where a server listens, and what one client may ask of it."""

from __future__ import annotations

from pydantic import Field, model_validator

from benthic.config.model import Positive
from benthic.config.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Limits(Settings):
    """What one request may be, and how long its parts may take; whatever is beyond is refused before it costs anything.

    `answers` bounds n, and `prompts` the prompts of a completion times n. `queue` answers may wait beyond those that
    the engine runs at once; more get 429. A schema is compiled in a process of its own, which ends after
    `compile_seconds`. `body_seconds` is for a body to arrive, `send_seconds` for a client to take what was written,
    `request_seconds` for all of an answer. For a client that takes nothing, at most `unread_bytes` wait in memory. An
    engine silent for `silence_seconds` is unhealthy; after `hang_seconds` it is ended and started again.
    """

    body_bytes: Positive = 4 * 2**20
    header_bytes: int = Field(64 * 2**10, ge=8192)
    headers: int = Field(100, ge=1, le=100)
    json_depth: Positive = 64
    messages: Positive = 2048
    prompts: Positive = 128
    answers: int = Field(16, ge=1, le=128)
    stops: Positive = 4
    stop_bytes: Positive = 256
    bias_entries: int = Field(1024, ge=1, le=1024)
    tools: Positive = 128
    schema_bytes: Positive = 64 * 2**10
    schema_depth: Positive = 32
    schema_nodes: Positive = 2000
    compile_seconds: float = Field(2.0, gt=0)
    queue: int = Field(1024, ge=0)
    header_seconds: Positive = 10
    body_seconds: float = Field(30.0, gt=0)
    send_seconds: float = Field(30.0, gt=0)
    unread_bytes: Positive = 24 * 2**10
    request_seconds: float = Field(600.0, gt=0)
    silence_seconds: float = Field(10.0, gt=0)
    hang_seconds: float = Field(300.0, gt=0)


class ServeConfig(Settings):
    """One server. Only `open_to_all` lets one without API keys listen beyond this machine. A first SIGTERM waits at
    most `drain_seconds` for the answers that are on their way."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    model_name: str = Field(min_length=1, max_length=256)
    key_digests: tuple[bytes, ...] = ()
    open_to_all: bool = False
    drain_seconds: float = Field(30.0, ge=0)
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _is_not_open_by_accident(self) -> ServeConfig:
        if self.host not in LOOPBACK and not self.key_digests and not self.open_to_all:
            raise ValueError(
                f"host {self.host} lets other machines in, and there is no API key; give --api-key-file, or --open if "
                "whoever reaches this address may use the model"
            )
        return self
