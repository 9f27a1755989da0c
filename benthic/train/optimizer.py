"""AdamW on float32 master weights, with the manifest's groups.

A float32 model is its own master. Of a bfloat16 model each parameter has a float32 copy that moments and updates
act on; gradients are added up in float32 as soon as a backward pass has made them, and the bfloat16 one is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from benthic.config.manifest import parameters
from benthic.config.train import OptimizerConfig
from benthic.errors import CheckpointError
from benthic.model.language_model import LanguageModel
from benthic.parallel.placement import local
from benthic.parallel.world import ALONE, World

FIRST, SECOND = "exp_avg", "exp_avg_sq"


class Optimizer:
    """The masters of a model, their gradients and moments. `masters` maps parameter names to float32 tensors."""

    def __init__(self, model: LanguageModel, config: OptimizerConfig, world: World = ALONE) -> None:
        self.config = config
        self._world = world
        self._parameters = dict(model.named_parameters())
        self.masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        rows = {row.name: row for row in parameters(model.config)}
        self._routed = {name for name in self.masters if rows[name].part == "routed" and world.layout.expert > 1}
        groups = {name: row.group for name, row in rows.items()}
        decayed = [master for name, master in self.masters.items() if groups[name] in config.decayed_groups]
        others = [master for name, master in self.masters.items() if groups[name] not in config.decayed_groups]
        settings = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in settings if group["params"]],
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )

    def zero_gradients(self) -> None:
        """Forget the gradients of the update before."""
        for name, master in self.masters.items():
            self._parameters[name].grad = master.grad = None

    def gradient_norm(self) -> Tensor:
        """The joint norm of all gradients, on all ranks, a scalar."""
        if self._world.size > 1:
            for name, master in self.masters.items():
                gradient = self._parameters[name].grad
                master.grad = None if gradient is None else local(gradient)
            routed = [one.grad for name, one in self.masters.items() if name in self._routed and one.grad is not None]
            dense = [
                one.grad for name, one in self.masters.items() if name not in self._routed and one.grad is not None
            ]
            return self._world.squared_norm(dense, routed).sqrt()
        return torch.nn.utils.get_total_norm(
            [master.grad for master in self.masters.values() if master.grad is not None]
        )

    def bad_gradients(self) -> list[str]:
        """Names of parameters whose gradient holds a value that is not finite."""
        return [
            name
            for name, master in self.masters.items()
            if master.grad is not None and not master.grad.isfinite().all()
        ]

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: Tensor) -> None:
        """One update of masters and parameters, with gradients scaled so that their norm is at most `clip_norm`."""
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.clip_norm, gradient_norm)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, master in self.masters.items():
            parameter = self._parameters[name]
            if parameter is not master and not isinstance(parameter, DTensor):
                parameter.copy_(master)

    def moments(self) -> dict[str, Tensor]:
        """`exp_avg.<name>` and `exp_avg_sq.<name>` of every parameter that has been updated."""
        return {
            f"{kind}.{name}": self._adamw.state[master][kind]
            for name, master in self.masters.items()
            for kind in (FIRST, SECOND)
            if master in self._adamw.state
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
        for name, master in self.masters.items():
            _refuse_other_shape(name, master, masters, moments)
            master.copy_(masters[name])
            if f"{FIRST}.{name}" in moments:
                self._adamw.state[master] = {
                    "step": torch.tensor(float(updates), device=master.device),
                    FIRST: moments[f"{FIRST}.{name}"].to(master.device, copy=True),
                    SECOND: moments[f"{SECOND}.{name}"].to(master.device, copy=True),
                }
        self._publish()


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


def _master(parameter: torch.nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor):
        # FSDP keeps the masters itself and gathers them in the compute type: this rank's block is updated in place.
        return parameter.detach().to_local()
    if parameter.dtype == torch.float32:
        return parameter
    master = parameter.detach().float()

    def add_up(finished: Tensor) -> None:
        gradient, finished.grad = finished.grad, None
        if gradient is not None:
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)

    parameter.register_post_accumulate_grad_hook(add_up)
    return master
