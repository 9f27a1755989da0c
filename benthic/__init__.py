"""benthic: plan, train, serve and look inside DeepSeek-V3-style language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benthic.config import ModelConfig as ModelConfig
    from benthic.inference.engine import Engine as Engine
    from benthic.inference.pretrained import load_model as load_model
    from benthic.inference.pretrained import save_model as save_model
    from benthic.model.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"
__all__ = ["Engine", "ModelConfig", "SamplingParams", "load_model", "save_model"]

# Resolved on first use, so that importing benthic never imports torch.
_HOME = {
    "Engine": "benthic.inference.engine",
    "ModelConfig": "benthic.config",
    "SamplingParams": "benthic.model.sampling",
    "load_model": "benthic.inference.pretrained",
    "save_model": "benthic.inference.pretrained",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'benthic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
