"""Refusal: an error that a client gets, in OpenAI's shape."""

from __future__ import annotations

from benthic.serve.wire import Error, Errors, encode


class Refusal(Exception):
    """HTTP `status`; `kind`, `param` and `code` are the body's type, param and code.

    `retry_after` seconds tell a client when to come again; without them it is told not to.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> bytes:
        """The JSON that OpenAI's clients read."""
        return encode(Errors(Error(self.message, self.kind, self.param, self.code)))

    @property
    def headers(self) -> dict[str, str]:
        """Whether and when to come again: clients try 408, 429 and all above 499 twice more unless they are told."""
        if self.retry_after is not None:
            return {"retry-after": str(self.retry_after)}
        return {"x-should-retry": "false"} if self.status in (408, 409) or self.status >= 500 else {}


def unavailable(message: str, code: str, retry_after: int = 2) -> Refusal:
    """The server cannot answer now, through no fault of the client."""
    return Refusal(503, message, "server_error", code=code, retry_after=retry_after)


def wrong(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request is at fault, and would be again."""
    return Refusal(400, message, param=param, code=code)
