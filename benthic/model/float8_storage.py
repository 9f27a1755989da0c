"""A model for inference whose matrices are kept in FP8 alone: e4m3 with a factor for each 128 x 128, the layout in
which DeepSeek-V3 is published. Half the bytes of bfloat16, and at small batches the bytes of weights are the time.

In FP8: what the published checkpoints store in FP8, which are attention's projections, dense feed-forwards and experts,
shared and routed, of prediction layers too. In the model's dtype: embedding, head, norms, routers and `eh_proj`, as
published; and `kv_b_proj`, which decoding does not apply to tokens: its halves move queries into the latent space and
values out of it, head by head (DeepSeek-V2, section 2.1.2). As in DeepSeek's own code it is given back once, at load.

Modules change their class, and their weights the dtype; the factors are buffers named as on disk, `..._scale_inv`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benthic import ops
from benthic.config.manifest import Parameter, parameters
from benthic.config.model import ModelConfig
from benthic.errors import ConfigError
from benthic.log import logger
from benthic.model.feed_forward import Experts
from benthic.model.language_model import LanguageModel
from benthic.model.primitive import Linear
from benthic.numerics.reference.quantisation import BLOCK, quantise_blocks
from benthic.ops.route import Routing

FLOAT8 = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"


class StoredFloat8Linear(Linear):
    """x @ weight.T (+ bias), `weight` e4m3 [out, in] with `weight_scale_inv`."""

    weight_scale_inv: Tensor

    def forward(self, input: Float[Tensor, "*tokens into"]) -> Float[Tensor, "*tokens out"]:
        out = ops.linear_from_float8(input, self.weight, self.weight_scale_inv)
        return out if self.bias is None else out + self.bias


class StoredFloat8Experts(Experts):
    """Both stacks e4m3, with `gate_up_proj_scale_inv` [E, 2F / 128, D / 128] and `down_proj_scale_inv`."""

    gate_up_proj_scale_inv: Tensor
    down_proj_scale_inv: Tensor

    def forward(self, x: Float[Tensor, "tokens width"], routing: Routing) -> Float[Tensor, "tokens width"]:
        gate_up = self.gate_up_proj, self.gate_up_proj_scale_inv
        down = self.down_proj, self.down_proj_scale_inv
        return ops.experts_from_float8(x, routing.experts, routing.weights, *gate_up, *down, routing.count)


def store_in_float8(model: LanguageModel) -> None:
    """Keep `model`'s matrices in FP8 from now on, in place. On the meta device memory stays to be filled.

    What stays and why is logged. Raises ConfigError for a device that cannot multiply such matrices, and where none of
    them can be stored so.
    """
    refusal = why_not_float8(model.head_weight.device, model.head_weight.dtype)
    if refusal is not None:
        raise ConfigError(f"weights cannot be kept in float8: {refusal}", hint="leave weights at 'plain'")
    kept: dict[str, str] = {}
    count = 0
    for row, reason in storage(model.config):
        if reason is not None:
            kept[row.name] = reason
            continue
        path, _, name = row.name.rpartition(".")
        _store(model.get_submodule(path), name)
        count += 1
    if not count:
        reasons = "; ".join(dict.fromkeys(kept.values()))
        raise ConfigError(f"no matrix of this model can be kept in float8: {reasons}", hint="leave weights at 'plain'")
    logger.info("weights: %d matrices kept in float8", count)
    for reason, number in Counter(kept.values()).items():
        logger.info("weights: %d kept in %s: %s", number, model.head_weight.dtype, reason)


def storage(config: ModelConfig) -> Iterator[tuple[Parameter, str | None]]:
    """Parameters that checkpoints may hold in FP8, each with the reason why it is not kept so, None where it is."""
    for row in parameters(config):
        if row.fp8:
            yield row, _why_kept(row)


def why_not_float8(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why matrices in FP8 cannot be used there, None where they can."""
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found != (9, 0):
            name = torch.cuda.get_device_name(device)
            return f"the kernels are for Hopper GPUs (sm_90); {name} is sm_{found[0]}{found[1]}"
        if dtype != torch.bfloat16:
            return f"a GPU multiplies them with bfloat16; the model computes in {dtype}"
    elif device.type not in ("cpu", "meta"):
        return f"a Hopper GPU or a processor is needed, not {device}"
    return None


def _why_kept(row: Parameter) -> str | None:
    if row.name.endswith("kv_b_proj.weight"):
        return "kv_b_proj, whose halves are used head by head"
    rows, columns = row.shape[-2:]
    if row.part == "routed":
        inner = columns if row.name.endswith("down_proj") else rows // 2
        if inner % BLOCK[0]:
            return f"a factor would reach across gate and up: moe_intermediate_size {inner} is no multiple of 128"
        width = rows if row.name.endswith("down_proj") else columns
        return f"a width of {width} is no multiple of 16" if width % 16 else None
    # Rows of whole 16 bytes are what kernels read, e4m3, and write, bfloat16.
    misfit = columns if columns % 16 else rows if rows % 8 else None
    return None if misfit is None else f"widths of {rows} and {columns} are no multiples of 8 and 16"


def _store(module: nn.Module, name: str) -> None:
    """Swap one parameter for values and factors, unless it was."""
    weight = getattr(module, name).detach()
    if weight.dtype == FLOAT8:
        return
    if weight.is_meta:
        shape = (*weight.shape[:-2], *(-(-size // unit) for size, unit in zip(weight.shape[-2:], BLOCK, strict=True)))
        values, scales = torch.empty_like(weight, dtype=FLOAT8), weight.new_empty(shape, dtype=torch.float32)
    elif weight.ndim == 2:
        values, scales = quantise_blocks(weight)
    else:
        values = torch.empty_like(weight, dtype=FLOAT8)
        of_experts = []
        for target, matrix in zip(values, weight, strict=True):
            quantised, factors = quantise_blocks(matrix)
            target.copy_(quantised)
            of_experts.append(factors)
        scales = torch.stack(of_experts)
    delattr(module, name)
    module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    module.register_buffer(name + SCALE_SUFFIX, scales)
    module.__class__ = StoredFloat8Experts if isinstance(module, Experts) else StoredFloat8Linear
