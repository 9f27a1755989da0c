"""One model over several processes: attention by data, experts by rank (DeepSeek-V3, section 3.4).

    torchrun --nproc-per-node 2 answers.py

    with SpreadEngine(folder) as engine:                          # the same on every rank
        mine = engine.generate(prompts[engine.rank :: engine.size], params)

Every rank holds all that is no routed expert, its own cache and its own requests; routed experts are spread, and each
step exchanges tokens in every expert layer. So ranks step together: a rank without work takes part with no tokens, and
what one of them cannot go on with ends all. The popular experts may have copies, placed by loads that an engine
measured before. Decoding is not captured in graphs, whose messages would need fixed lengths, and nothing is drafted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benthic.checkpoint.reader import load_into, open_checkpoint
from benthic.config.engine import EngineConfig
from benthic.config.model import ModelConfig
from benthic.errors import CapacityError, ConfigError, PeerError
from benthic.inference.admission import Prompt
from benthic.inference.completion import Completion, Event
from benthic.inference.engine import Engine
from benthic.log import logger
from benthic.model import LanguageModel
from benthic.model.feed_forward import ExpertLayer
from benthic.model.float8_storage import store_in_float8, why_not_float8
from benthic.model.room import available_bytes
from benthic.model.sampling import SamplingParams
from benthic.parallel.copies import Copies, Holdings, place_experts
from benthic.parallel.experts import ExchangedExpertLayer
from benthic.text import Tokenizer
from benthic.text.tokenizer import TOKENIZER_FILE

_IDLE, _BUSY, _FAILED = 0, 1, 2

Loads = Mapping[int, Sequence[float]]
"""Of each expert, by the index of its layer."""


class SpreadEngine(Engine):
    """An Engine of one rank among those that torchrun started; calls of `generate`, and of `step`, are made by all.

    `spare` is the number of places a rank has for copies of experts, and `loads` says which are popular, as
    `measured_loads` of an earlier engine has it; without it all are held alike.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str | torch.device | None = None,
        *,
        dtype: torch.dtype | None = None,
        settings: EngineConfig | None = None,
        spare: int = 0,
        loads: Loads | None = None,
    ) -> None:
        settings = settings or EngineConfig()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu"))
        self._joins = not dist.is_initialized()
        if self._joins:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            # The ranks of a machine share its memory.
            together = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
            settings = settings.replace(memory_share=settings.memory_share / together)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._words = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._state = _IDLE
        folder = Path(folder)
        try:
            model = _load(folder, device, dtype, settings, spare, loads)
            tokenizer = Tokenizer.from_folder(folder) if (folder / TOKENIZER_FILE).is_file() else None
            plain = settings.replace(cuda_graphs=False, weights="auto")
            super().__init__(model, tokenizer=tokenizer, settings=plain)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the other ranks, where the engine had joined them."""
        if self._joins and dist.is_initialized():
            dist.destroy_process_group()

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[Completion]:
        """Answers to this rank's own `prompts`, which may be none, while the others answer theirs. Where one rank
        fails, the others raise PeerError."""
        try:
            done = super().generate(prompts, params, on_event)
        except PeerError:
            raise
        except BaseException:
            self._tell(_FAILED)
            raise
        # The others may need this rank's experts still.
        self.step()
        while self._state == _BUSY:
            self.step()
        return done

    def step(self) -> list[Event]:
        """As Engine.step, on all ranks together; a rank without work computes for the others."""
        self._state = self._tell(_BUSY if self.has_work else _IDLE)
        if self._state == _FAILED:
            raise PeerError("another rank could not go on")
        if self.has_work:
            return super().step()
        if self._state == _BUSY:
            self._stand_by()
        return []

    def measured_loads(self) -> dict[int, list[int]]:
        """How many tokens each expert of each layer got so far, on all ranks; called by all."""
        counts = self.expert_load.counts()
        for total in counts.values():
            dist.all_reduce(total, group=self._words)
        return {layer: total.tolist() for layer, total in counts.items()}

    @torch.inference_mode()
    def _stand_by(self) -> None:
        """Take part in a step of the others, with no tokens of one's own."""
        nothing = torch.empty(1, 0, self.model.config.hidden_size, device=self.runner.device, dtype=self.runner.dtype)
        for layer in _expert_layers(self.model):
            self.model.get_submodule(f"model.layers.{layer}.mlp")(nothing)

    def _make_room(self, error: torch.OutOfMemoryError) -> None:
        """The others are in the middle of the step, so it cannot be taken back."""
        raise CapacityError(
            f"{self.runner.device} has no memory for a step: {str(error).splitlines()[0]}",
            hint="give the engine a smaller memory_share or max_step_tokens",
        ) from None

    def _tell(self, state: int) -> int:
        """The largest state of all ranks."""
        seen = torch.tensor(state)
        try:
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._words)
        except RuntimeError as error:
            raise PeerError(f"another rank is gone: {str(error).splitlines()[0]}") from None
        return int(seen)


def _expert_layers(model: LanguageModel) -> list[int]:
    """Indices of the main model's layers that have experts."""
    return [layer for layer in range(model.config.num_hidden_layers) if model.config.is_expert_layer(layer)]


def _load(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    settings: EngineConfig,
    spare: int,
    loads: Loads | None,
) -> LanguageModel:
    """This rank's part of the model: all but the experts that others hold."""
    checkpoint = open_checkpoint(folder)
    # Prediction layers would take memory, and nothing is drafted.
    checkpoint = replace(checkpoint, config=checkpoint.config.replace(num_nextn_predict_layers=0))
    config = checkpoint.config
    if not config.n_routed_experts:
        raise ConfigError("a model without routed experts has nothing to spread", hint="use benthic.Engine")
    dtype = dtype or getattr(torch, config.dtype)
    model = LanguageModel(config, device=torch.device("meta"), dtype=dtype)
    holdings = _holdings(config, loads, spare)
    held = _cut(model, holdings, device)
    stored = settings.weights == "auto" and config.quantization_config is not None and device.type == "cuda"
    if settings.weights == "float8" or (stored and why_not_float8(device, dtype) is None):
        store_in_float8(model)
    needed = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    available = available_bytes(device)
    if available is not None and needed > available:
        raise CapacityError(
            f"this rank's part of the model needs {needed / 2**30:.1f} GiB; {device} has {available / 2**30:.1f} GiB",
            hint="start more processes, or choose fewer spare places",
        )
    model.to_empty(device=device)
    load_into(model, checkpoint, held)
    rank = dist.get_rank()
    logger.info("rank %d: %.1f GiB of weights", rank, needed / 2**30)
    return model.eval()


def _holdings(config: ModelConfig, loads: Loads | None, spare: int) -> dict[int, Holdings]:
    ranks, experts = dist.get_world_size(), config.n_routed_experts
    even, places = [1.0] * experts, -(-experts // ranks) + spare
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_expert_layer(layer)]
    return {layer: place_experts((loads or {}).get(layer, even), ranks, places) for layer in layers}


def _cut(model: LanguageModel, holdings: Mapping[int, Holdings], device: torch.device) -> dict[str, Sequence[int]]:
    """Leave this rank's experts, on the meta device, and let tokens travel; which experts each stack holds then."""
    rank, group = dist.get_rank(), cast(dist.ProcessGroup, dist.group.WORLD)
    held: dict[str, Sequence[int]] = {}
    for index, holding in holdings.items():
        layer = model.model.layers[index]
        whole = layer.mlp
        assert isinstance(whole, ExpertLayer), "an expert layer of another kind"
        for name, stack in list(whole.experts.named_parameters()):
            mine: Tensor = stack.detach()[: len(holding[rank])]
            setattr(whole.experts, name, nn.Parameter(torch.empty_like(mine), requires_grad=False))
            held[f"model.layers.{index}.mlp.experts.{name}"] = holding[rank]
        copies = Copies(holding, rank, device)
        layer.mlp = ExchangedExpertLayer(whole.gate, whole.experts, whole.shared_experts, group, copies=copies)
    return held
