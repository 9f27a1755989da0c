"""AdamW on float32 master weights, with the manifest's groups.

A float32 model is its own master. Of a bfloat16 model each parameter has a float32 copy that moments and updates act
on. A gradient that one micro-batch alone has made stays as its product wrote it; from the second on gradients are added
up in float32 as soon as a backward pass has made them, and the bfloat16 ones are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from benthic.config.manifest import parameters
from benthic.config.train import OptimizerConfig
from benthic.errors import CheckpointError
from benthic.model.language_model import LanguageModel
from benthic.numerics.reference.adamw import Rule
from benthic.ops.adamw import gradient_norms
from benthic.parallel.placement import block, copies, local, undivided
from benthic.parallel.world import ALONE, World
from benthic.train.adamw import FIRST, SECOND, OnePass, OnProcessor
from benthic.train.offload import Lanes, lanes_of


class Optimizer:
    """The masters of a model, their gradients and moments. `masters` maps parameter names to float32 tensors.

    `moments` is the dtype moments are stored in. With `offload` moments and a bfloat16 model's masters live in the
    processor's memory. Functions in `before_step` are called before masters change: who reads them aside must be done.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: OptimizerConfig,
        moments: Literal["float32", "bfloat16"] = "float32",
        offload: bool = False,
        world: World = ALONE,
    ) -> None:
        self.config, self.updates = config, 0
        self.before_step: list[Callable[[], None]] = []
        self._world = world
        self._trained = dict(model.named_parameters())
        # FSDP's masters are float32 already, and gathered in the compute type: this rank's blocks are updated in place.
        self._parameters: dict[str, Tensor] = {name: block(parameter) for name, parameter in self._trained.items()}
        rows = list(parameters(model.config))
        self._copies = {row.name: copies(row, world) for row in rows}
        self._undivided = [row.name for row in rows if undivided(row)] if world.layout.tensor > 1 else []
        self._sums: dict[str, Tensor] = {}
        self._device = next(iter(self._parameters.values())).device
        lanes = lanes_of(self._device) if offload else None
        self.masters = {name: self._master(name, parameter, lanes) for name, parameter in self._parameters.items()}
        decayed = config.decayed_groups
        self._decayed = frozenset(row.name for row in rows if row.group in decayed)
        if self._device.type == "cpu" and moments == "float32" and lanes is None:
            self._adamw = OnProcessor(config, self.masters, self._parameters, self._decayed)
        else:
            self._adamw = OnePass(self.masters, self._parameters, getattr(torch, moments), lanes)

    def _master(self, name: str, parameter: Tensor, lanes: Lanes | None) -> Tensor:
        if parameter.dtype == torch.float32:
            return parameter

        def add_up(finished: Tensor) -> None:
            gradient, finished.grad = finished.grad, None
            if gradient is None:
                return
            total = self._sums.get(name)
            self._sums[name] = self._adamw.keeps(gradient) if total is None else total.float().add_(gradient)

        parameter.register_post_accumulate_grad_hook(add_up)
        master = parameter.detach().float()
        return master if lanes is None else lanes.keep(master)

    def gradients(self) -> dict[str, Tensor]:
        """What backward passes have left since `zero_gradients`, by name: of this rank's blocks, the sums over ranks.
        A rank may hold nothing of a small tensor."""
        own = {name: local(one.grad) for name, one in self._trained.items() if one.grad is not None}
        return {name: gradient for name, gradient in own.items() if gradient.numel()} | self._sums

    def zero_gradients(self) -> None:
        """Forget the gradients of the update before."""
        self._sums.clear()
        for parameter in self._trained.values():
            parameter.grad = None

    @torch.no_grad()
    def add_up_tensor_ranks(self) -> None:
        """Sum over tensor ranks the gradients of what each of them holds whole: each had its own positions or heads."""
        found = self.gradients()
        self._world.add_up_tensor_ranks(*(found[name] for name in self._undivided if name in found))

    def gradient_norms(self) -> dict[str, Tensor]:
        """The norm of each gradient by name, float32 scalars on the device."""
        found = self.gradients()
        return dict(zip(found, gradient_norms(list(found.values())).unbind(), strict=True))

    def joint_norm(self, norms: Mapping[str, Tensor]) -> Tensor:
        """The norm of all gradients together, on all ranks, from those of this rank's blocks by name."""
        if self._world.size == 1:
            return joint_norm(norms)
        by_copies: dict[int, dict[str, Tensor]] = {}
        for name, norm in norms.items():
            by_copies.setdefault(self._copies[name], {})[name] = norm
        return self._world.joint_norm({count: joint_norm(some) for count, some in by_copies.items()})

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: Tensor, finite: Tensor | None = None) -> None:
        """One update of masters and parameters, with gradients scaled so that their norm is at most `clip_norm`.

        Nothing changes where `finite` (bool [], on the device; by default whether the norm is finite) is False; a GPU
        finds that out by itself.
        """
        for wait in self.before_step:
            wait()
        config, self.updates = self.config, self.updates + 1
        clip = torch.ones_like(gradient_norm)
        if config.clip_norm is not None:
            clip = (config.clip_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        plain = Rule(learning_rate, config.beta1, config.beta2, config.epsilon, 0.0, self.updates)
        decaying = plain._replace(weight_decay=config.weight_decay)
        gradients = self.gradients()
        rules = {name: decaying if name in self._decayed else plain for name in gradients}
        self._adamw.step(gradients, rules, clip, gradient_norm.isfinite() if finite is None else finite)

    def moments(self) -> dict[str, Tensor]:
        """`exp_avg.<name>` and `exp_avg_sq.<name>` of every parameter that has been updated."""
        if not self.updates:
            return {}
        return {
            f"{kind}.{name}": one
            for name, both in self._adamw.moments.items()
            for kind, one in zip((FIRST, SECOND), both, strict=True)
        }

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], updates: int) -> None:
        """Take over masters and moments after `updates` updates. Raises CheckpointError naming what is missing."""
        missing = [name for name in self.masters if name not in masters]
        if missing:
            raise CheckpointError(f"the saved state lacks {len(missing)} weights, first {missing[0]!r}")
        if updates and not any(name.startswith(FIRST) for name in moments):
            raise CheckpointError(
                f"the saved state has made {updates} updates but lacks their moments",
                hint="move that state away; --resume then continues from the one before it",
            )
        found = {}
        for name, master in self.masters.items():
            _refuse_other_shape(name, master, masters, moments)
            master.copy_(masters[name])
            if self._parameters[name] is not master:
                self._parameters[name].copy_(master)
            if f"{FIRST}.{name}" in moments:
                found[name] = moments[f"{FIRST}.{name}"], moments[f"{SECOND}.{name}"]
        self.updates = updates
        self._adamw.take_over(found, updates)


def joint_norm(norms: Mapping[str, Tensor]) -> Tensor:
    """The norm of all gradients together, from that of each."""
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))


def _refuse_other_shape(
    name: str, master: Tensor, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    names = {"weight": name, FIRST: f"{FIRST}.{name}", SECOND: f"{SECOND}.{name}"}
    saved = {kind: (masters if kind == "weight" else moments).get(key) for kind, key in names.items()}
    for kind, tensor in saved.items():
        if tensor is not None and tensor.shape != master.shape:
            raise CheckpointError(
                f"the saved {kind} of {name} is {list(tensor.shape)}; the config makes it {list(master.shape)}",
                hint="resume with the model settings this state was trained with",
            )
    if (saved[FIRST] is None) != (saved[SECOND] is None):
        raise CheckpointError(f"the saved state holds one moment of {name}, not both")
