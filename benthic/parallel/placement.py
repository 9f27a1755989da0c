"""A model on its ranks: which part of each parameter a rank holds, from the manifest, and FSDP2 over the rest.

Routed experts are cut over the expert ranks; then every layer's weights, and those outside the layers, are one group
of FSDP2 each: float32 masters split over ranks, gathered for use in the compute type, gradients summed in float32.
Experts that no other rank holds are left out of it: they are this rank's own, as on one process, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from benthic.config.manifest import Parameter, parameters
from benthic.config.model import ModelConfig
from benthic.parallel.experts import ExchangedExpertLayer
from benthic.parallel.mesh import Seat
from benthic.parallel.tensor import split_sublayers, tensor_axis
from benthic.parallel.world import World


@dataclass(frozen=True, slots=True)
class Part:
    """The block of a tensor that a rank holds: the whole's `shape`, and where the block starts and how large it is."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def block(self) -> tuple[slice, ...]:
        """The index of the block in the whole."""
        return tuple(slice(start, start + size) for start, size in zip(self.start, self.size, strict=True))

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Part:
        """All of it."""
        return cls(shape, (0,) * len(shape), shape)


def local(tensor: Tensor) -> Tensor:
    """This rank's block of a tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def block(parameter: nn.Parameter) -> Tensor:
    """This rank's block of a parameter, to be written to in place; a plain parameter is its own."""
    return parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter


def spread(
    model: nn.Module,
    config: ModelConfig,
    world: World,
    compute: torch.dtype,
    in_float8: Collection[str] = (),
    roots: Mapping[nn.Module, Collection[int]] | None = None,
) -> None:
    """Cut `model` (on the meta device or a real one, float32) to this rank's part, in place; one process: nothing.

    Its parameters are then sharded DTensors that compute as `compute`. Rows of experts whose parameters are named by
    `in_float8` travel in FP8. `roots` are the modules whose calls, and `states`, gather their parameters, and the
    layers of each: the model itself, or the stages of a pipeline.
    """
    if world.dense is None or world.experts is None:
        return
    if world.tensor_group is not None:
        _cut_dense(model, config, world)
        split_sublayers(model, config, world.tensor_group)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # A schedule says itself when a stage of a pipeline needs its weights.
    keeps = world.layout.zero < 3 or world.layout.pipeline > 1
    dense = _data_mesh(world.dense, "replicate", "shard")
    copies = _data_mesh(world.experts, "expert_replicate", "expert_shard")
    own: set[nn.Parameter] = set()
    held = [row for row in parameters(config) if world.holds(row)]
    for path in expert_layers(held) if world.has_expert_mesh else ():
        experts = model.get_submodule(f"{path}.experts")
        if world.layout.expert > 1:
            _cut_experts(experts, world, torch.float32 if copies.size() > 1 else compute)
            _exchange(model, path, world, narrow=f"{path}.experts.gate_up_proj" in in_float8)
        if copies.size() > 1:
            _shard(experts, copies, policy, keeps, own, _shard_experts(world.grid.experts[2]))
        else:
            own.update(experts.parameters())
    every = sorted({row.layer for row in held if row.layer is not None})
    for layer in every:
        _shard(model.get_submodule(f"model.layers.{layer}"), dense, policy, keeps, own)
    for root, layers in (roots or {model: every}).items():
        # Outside the layers: embedding, last norm, head. The head is read by the loss, after the forward pass, so these
        # stay gathered until backward has ended.
        _shard(root, dense, policy, True, own)
        _prefetch([model.get_submodule(f"model.layers.{layer}") for layer in layers])
        register_fsdp_forward_method(root, "states")


def expert_layers(rows: Iterable[Parameter]) -> Iterator[str]:
    """Paths of the modules that hold router and experts, `model.layers.3.mlp`."""
    for row in rows:
        if row.part == "router" and row.group != "routing_bias":
            yield row.name.removesuffix(".gate.weight")


def _exchange(model: nn.Module, path: str, world: World, narrow: bool) -> None:
    """Put an expert layer in the place of the one at `path` whose tokens go to the ranks of their experts."""
    parts = dict(model.get_submodule(path).named_children())
    group = world.experts["expert"].get_group()  # pyrefly: ignore[unsupported-operation]  there is a mesh
    exchanged = ExchangedExpertLayer(parts["gate"], parts["experts"], parts.get("shared_experts"), group, narrow)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, exchanged)


def _cut_dense(model: nn.Module, config: ModelConfig, world: World) -> None:
    """Leave of each parameter that tensor ranks split this rank's piece."""
    index, ranks = world.sequence_place[-1], world.layout.tensor
    for row in parameters(config):
        axis = tensor_axis(row)
        if axis is None:
            continue
        owner, _, leaf = row.name.rpartition(".")
        module = model.get_submodule(owner)
        mine = getattr(module, leaf).detach().chunk(ranks, axis)[index].clone()
        setattr(module, leaf, nn.Parameter(mine))


def _data_mesh(mesh: DeviceMesh, replicate: str, shard: str) -> DeviceMesh:
    return mesh[replicate, shard] if mesh[replicate].size() > 1 else mesh[shard]


def _cut_experts(experts: nn.Module, world: World, dtype: torch.dtype) -> None:
    index, ranks = world.grid.expert_place(world.rank)[-1], world.layout.expert
    for name, weight in list(experts.named_parameters()):
        held = len(weight) // ranks
        mine = weight.detach()[index * held : (index + 1) * held].to(dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        setattr(experts.get_submodule(owner), leaf, nn.Parameter(mine))


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    keeps: bool,
    own: set[nn.Parameter],
    place: Callable[[nn.Parameter], Shard] | None = None,
) -> None:
    settings = {"mp_policy": policy, "reshard_after_forward": not keeps, "ignored_params": own}
    fully_shard(module, mesh=mesh, shard_placement_fn=place, **settings)
    if isinstance(module, FSDPModule):
        # The loss is divided by whole-update counts already: gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _prefetch(layers: list[nn.Module]) -> None:
    """Say which weights are gathered while a layer computes: the host waits for each exchange, so it cannot run ahead
    and start the next layer's by itself."""
    groups: list[list[FSDPModule]] = [
        [one for one in layer.modules() if isinstance(one, FSDPModule)] for layer in layers
    ]
    for here, after in pairwise(groups):
        here[0].set_modules_to_forward_prefetch(after)
        after[0].set_modules_to_backward_prefetch(here)


def _shard_experts(shards: int) -> Callable[[nn.Parameter], Shard]:
    return lambda stack: Shard(shard_dimension(tuple(stack.shape), shards))


def shard_dimension(shape: tuple[int, ...], shards: int) -> int:
    """Which dimension of a stack of experts is split over its copies: experts where they come out even, else rows."""
    return 0 if shape[0] % shards == 0 else 1


def parts(config: ModelConfig, seat: Seat) -> dict[str, Part]:
    """The block of each manifest row that this rank holds. Arithmetic: no model is needed."""
    return {row.name: part(row, seat) for row in parameters(config) if seat.holds(row)}


def part(row: Parameter, seat: Seat) -> Part:
    """The block of one row that this rank holds."""
    whole = Part.whole(row.shape)
    if seat.size == 1 or row.group == "routing_bias":
        return whole
    if row.part == "routed" and seat.has_expert_mesh:
        _, _, shard, expert = seat.grid.expert_place(seat.rank)
        mine = _split(whole, 0, seat.layout.expert, expert)
        shards = seat.grid.experts[2]
        return _split(mine, shard_dimension(mine.size, shards), shards, shard)
    _, _, shard, tensor = seat.grid.dense_place(seat.rank)
    axis = tensor_axis(row)
    mine = whole if axis is None else _split(whole, axis, seat.layout.tensor, tensor)
    return _split(mine, 0, seat.grid.dense[2], shard)


def copies(row: Parameter, seat: Seat) -> int:
    """How many ranks hold the same block of a row."""
    if row.part == "routed" and seat.has_expert_mesh:
        return seat.grid.experts[1]
    return seat.grid.dense[1] * (seat.layout.tensor if tensor_axis(row) is None else 1)


def undivided(row: Parameter) -> bool:
    """Whether every tensor rank holds all of a trained row, and its own tokens' part of the gradient."""
    return row.part != "routed" and row.group != "routing_bias" and tensor_axis(row) is None


def _split(part: Part, dimension: int, pieces: int, index: int) -> Part:
    """Piece `index` as torch.chunk cuts: equal pieces rounded up, the last ones shorter or empty."""
    length = part.size[dimension]
    piece = -(-length // pieces)
    begin = min(index * piece, length)
    start, size = list(part.start), list(part.size)
    start[dimension] += begin
    size[dimension] = min(piece, length - begin)
    return Part(part.shape, tuple(start), tuple(size))


def as_distributed(row: Parameter, block: Tensor, world: World) -> Tensor:
    """A rank's block as the DTensor of the whole, for a checkpoint; alone, the tensor itself. The block stays where it
    is: from_local would copy one on the processor to the mesh's GPU."""
    if world.storage is None or world.experts is None:
        return block
    placements: list[Placement]
    if row.part == "routed" and world.has_expert_mesh:
        mesh = world.experts["expert_replicate", "expert_shard", "expert"]
        held = row.shape[0] // world.layout.expert
        dimension = shard_dimension((held, *row.shape[1:]), world.grid.experts[2])
        inner = _StridedShard(0, split_factor=world.layout.expert) if dimension == 0 else Shard(1)
        placements = [Replicate(), inner, Shard(0)]
    else:
        mesh, axis = world.storage, tensor_axis(row)
        cut = Replicate() if axis is None else Shard(axis)
        placements = [Replicate(), cut, Replicate() if row.group == "routing_bias" else Shard(0)]
    stride = tuple(prod(row.shape[axis + 1 :]) for axis in range(len(row.shape)))
    facts = TensorMeta(torch.Size(row.shape), stride, block.dtype)
    return DTensor(block.detach(), DTensorSpec(mesh, tuple(placements), tensor_meta=facts), requires_grad=False)


def before_backward(model: nn.Module, is_last: bool, world: World) -> None:
    """What a micro-batch's backward is to leave. ZeRO 3 drops whole weights, and sums gradients over ranks, each time;
    below it whole weights stay for the next micro-batch, and gradients that are kept whole (0 and 1) are summed once
    an update."""
    if isinstance(model, FSDPModule) and world.layout.zero < 3:
        model.set_reshard_after_backward(is_last)
        model.set_requires_gradient_sync(is_last or world.layout.zero == 2)


def forget_gathered(model: nn.Module) -> None:
    """Drop whole weights that a forward pass without backward left gathered: they are older than the masters soon."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
