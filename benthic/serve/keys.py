"""API keys: kept as digests, compared in constant time."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Sequence
from hashlib import blake2b, sha256
from pathlib import Path

from benthic.config.settings import read_text
from benthic.errors import ConfigError
from benthic.serve.refusal import Refusal

SHORTEST = 16
_SALT_KEY = secrets.token_bytes(32)


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The digests of a file's keys: one a line; empty lines and lines that start with # are left out."""
    lines = [line.strip() for line in read_text(path, "API keys").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"no API key in {path}", hint="write one a line")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST or not key.isascii() or any(character.isspace() for character in key):
            raise ConfigError(
                f"key {number} of {path} is too short, or has characters that no header can carry",
                hint=f"at least {SHORTEST} of ASCII: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    return tuple(digest(key.encode()) for key in keys)


def digest(key: bytes) -> bytes:
    """What is kept of a key."""
    return sha256(key).digest()


class Keys:
    """Tells who may come in; without any key everybody may."""

    def __init__(self, digests: Sequence[bytes]) -> None:
        self._digests = tuple(digests)

    def admit(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The salt of who sent a request with `headers`: prompts share cached blocks with those of the same key alone.

        Raises Refusal 401.
        """
        if not self._digests:
            return ""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        mine, found = digest(key.strip()), False
        for one in self._digests:  # all of them: the time says nothing about which was close
            found |= hmac.compare_digest(one, mine)
        if not found or scheme.lower() != b"bearer":
            raise Refusal(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return blake2b(mine, key=_SALT_KEY, digest_size=16).hexdigest()
