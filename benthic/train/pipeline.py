"""Training in a pipeline: torch's stages and schedules (torch.distributed.pipelining), fed with micro-batches.

A rank holds one stage of the model, or several. All ranks of a pipeline have read the same batch, so that each has the
tokens, for positions and document borders, and the last stage the labels. What a stage adds to the loss by itself, the
balance losses of its layers, joins the graph where the stage ends: backward makes its gradient when that of the states
arrives. So the update's gradients are those of one process, and its losses the sums of what all ranks have recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import PipelineStage, schedules

from benthic.config.train import TrainConfig
from benthic.data import Batch
from benthic.log import logger
from benthic.model.language_model import LanguageModel, States
from benthic.model.stage import Stage, cut_to_stages, width_passed
from benthic.parallel.world import World
from benthic.plan.holdings import stages_of_rank
from benthic.train.loss import Losses, Scale, losses_of

SCHEDULES = {
    "1f1b": schedules.Schedule1F1B,
    "gpipe": schedules.ScheduleGPipe,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zb1p": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
SPLITTING = ("zb1p", "zbv", "dualpipev")
"""Schedules that make gradients of weights apart from those of states, to fill gaps with them."""


class Section(nn.Module):
    """One stage at work: what it passes on for a micro-batch, or at the end the loss; `parts` records each one's."""

    def __init__(self, stage: Stage, config: TrainConfig) -> None:
        super().__init__()
        self.stage, self._config = stage, config
        self.parts: list[Losses] = []
        self._scale, self._weight = Scale(1, 1), 0.0

    def begin(self, scale: Scale, weight: float) -> None:
        """Make ready for an update; `weight` is that of the prediction loss."""
        self.parts, self._scale, self._weight = [], scale, weight

    def forward(self, *passed: Tensor, tokens: Tensor, documents: Tensor) -> Tensor:
        """From what the stage before passed on. `tokens` and `documents` are the micro-batch's, int64 [B, S + 1]."""
        config, batch = self._config, Batch(tokens, documents)
        states = self._states(batch, passed[0] if passed else None, config.model.num_nextn_predict_layers)
        masked = config.data.mask_documents
        rest = masked, self._weight, config.balance, config.model
        part = losses_of(states, self.stage.head_weight, batch, self._scale, *rest)
        total, part.total = part.total, part.total.detach()
        self.parts.append(part)
        if self.stage.ends:
            return total
        return _WithLoss.apply(states.hidden, total) if total.requires_grad else states.hidden

    def states(self, batch: Batch, passed: Tensor | None, num_predictions: int) -> States:
        """Without a loss, for validation."""
        return self._states(batch, passed, num_predictions)

    def _states(self, batch: Batch, passed: Tensor | None, num_predictions: int) -> States:
        documents = batch.documents[:, :-1] if self._config.data.mask_documents else None
        return self.stage(batch.tokens[:, :-1], passed, documents, num_predictions)


def as_sections(whole: LanguageModel, stages: Sequence[range], config: TrainConfig) -> list[Section]:
    """Cut `whole` to `stages`, the layers of each, in place. It keeps their tensors under the published names, for all
    that deals with tensors; and the sections, which gather them, as `sections`."""
    sections = [Section(stage, config) for stage in cut_to_stages(whole, stages)]
    whole.add_module("sections", nn.ModuleList(sections))
    return sections


class Pipeline:
    """The sections of one rank, and the ranks before and behind it."""

    def __init__(self, config: TrainConfig, sections: dict[int, Section], dtype: torch.dtype, world: World) -> None:
        if world.dense is None:
            raise RuntimeError("a pipeline has several ranks")
        logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)  # it prints the schedule beside each error
        self._config, self._sections, self._dtype, self._world = config, sections, dtype, world
        self._group: dist.ProcessGroup = world.dense["pipeline"].get_group()
        ranks = range(world.layout.pipeline)
        self._owner = {stage: rank for rank in ranks for stage in stages_of_rank(world.layout, rank)}
        self._schedules: dict[int, Any] = {}
        self._at_once = _makes_gradients_at_once(config)
        if self._at_once and world.layout.schedule in SPLITTING:
            logger.info(
                "schedule %s: gradients of weights are made together with those of states and fill no gaps, since "
                "%s is not made to be split",
                world.layout.schedule,
                self._at_once,
            )
        self.ends_here = any(section.stage.ends for section in sections.values())

    def learn(self, batch: Batch, scale: Scale, weight: float) -> list[Losses]:
        """Gradients of an update on `batch`, which lies on the device; what each micro-batch adds to its loss on this
        rank."""
        for section in self._sections.values():
            section.begin(scale, weight)
        count = len(batch.tokens) // self._config.batch.micro_sequences
        if count not in self._schedules:
            self._schedules[count] = self._schedule(count)
        facts = {"tokens": batch.tokens, "documents": batch.documents}
        try:
            self._schedules[count].step(**facts, target=batch.tokens, return_outputs=False)
        except RuntimeError as error:
            raise _first_cause(error) from None
        return [_together(parts) for parts in zip(*(one.parts for one in self._sections.values()), strict=True)]

    @torch.no_grad()
    def states(self, batch: Batch, num_predictions: int) -> States:
        """A batch read without learning from it: `hidden` and `predictions` where the pipeline ends, and the routing of
        this rank's layers."""
        batch_size, length = batch.tokens.shape[0], batch.tokens.shape[1] - 1
        found, routing = States(torch.empty(0), [], {}), {}
        passed: Tensor | None = None
        rank = self._group.rank()
        for stage in range(len(self._owner)):
            if self._owner[stage] != rank:
                continue
            if stage and self._owner[stage - 1] != rank:
                shape = (batch_size, length, width_passed(self._config.model))
                passed = torch.empty(shape, dtype=self._dtype, device=self._world.device)
                dist.recv(passed, group=self._group, group_src=self._owner[stage - 1])
            found = self._sections[stage].states(batch, passed, num_predictions)
            passed = found.hidden
            routing |= found.routing
            if stage + 1 in self._owner and self._owner[stage + 1] != rank:
                dist.send(passed.contiguous(), group=self._group, group_dst=self._owner[stage + 1])
        return States(found.hidden, found.predictions, routing)

    def _schedule(self, micro_batches: int) -> Any:
        """torch's schedule for so many micro-batches: it keeps a buffer for each."""
        config, world = self._config, self._world
        shape = (config.batch.micro_sequences, config.data.sequence_length, width_passed(config.model))
        passed = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        stages = [
            _Stage(
                section,
                index,
                len(self._owner),
                world.device,
                input_args=() if section.stage.begins else (passed,),
                output_args=(loss if section.stage.ends else passed,),
                group=self._group,
                dw_builder=_nothing_left if self._at_once else None,
            )
            for index, section in self._sections.items()
        ]
        kind: Any = SCHEDULES[world.layout.schedule]
        single = issubclass(kind, schedules.PipelineScheduleSingle)
        return kind(stages[0] if single else stages, micro_batches, loss_fn=_loss_itself, scale_grads=False)


class _Stage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """torch 2.11 greets the neighbours of a stage, of which one can be this rank; gloo cannot send there."""
        return [one for one in super()._get_init_p2p_neighbors_ops() if one.group_peer != self.group_rank]

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """torch adds these gradients to `grad` by itself, so that hooks which wait for them (the optimiser's sums of a
        bfloat16 parameter's gradients) do not hear of it."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        for parameter in self.submod.parameters():
            if parameter.grad is not None:
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)


class _WithLoss(torch.autograd.Function):
    """States as they are; backward also begins at a loss that they do not lead to."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor) -> Tensor:
        ctx.mark_dirty(states)  # the same tensor, no view of it: a schedule cuts it off its graph later
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:  # pyrefly: ignore[bad-override]
        (gradient,) = grad_outputs
        return gradient, gradient.new_ones((), dtype=torch.float32)


def _makes_gradients_at_once(config: TrainConfig) -> str | None:
    """What of a run makes the gradients of a layer's weights and inputs in one pass: splitting it runs it twice."""
    if config.memory.recomputation != "none":
        return f"memory.recomputation {config.memory.recomputation}"
    return "precision.compute float8" if config.precision.compute == "float8" else None


def _nothing_left() -> Callable[[], None]:
    """What a stage is to do for the gradients of weights when those of states have been made: nothing."""
    return lambda: None


def _loss_itself(output: Tensor, target: Tensor) -> Tensor:
    return output


def _together(parts: Sequence[Losses]) -> Losses:
    """What several stages add to the loss of one micro-batch."""
    loads = {layer: load for part in parts for layer, load in part.loads.items()}
    sums = torch.stack([torch.stack((one.total, one.main, one.prediction, one.balance)) for one in parts]).sum(0)
    total, main, prediction, balance = sums.unbind()
    return Losses(total, main, prediction, balance, loads)


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong inside a stage: the schedule wraps it in a description of the stage's tensors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
