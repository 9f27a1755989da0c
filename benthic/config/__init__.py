"""Floor 0: configuration as frozen data, importable without torch."""

from benthic.config.model import LATENT_NORM_EPS, Fp8Quantization, ModelConfig, RopeParameters
from benthic.config.settings import Settings

__all__ = ["LATENT_NORM_EPS", "Fp8Quantization", "ModelConfig", "RopeParameters", "Settings"]
