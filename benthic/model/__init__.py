"""The network: mathematics only, named as the published checkpoints are."""

from benthic.model.cache import Cache
from benthic.model.initialisation import initialise
from benthic.model.language_model import LanguageModel, States
from benthic.ops.route import Routing

__all__ = ["Cache", "LanguageModel", "Routing", "States", "initialise"]
