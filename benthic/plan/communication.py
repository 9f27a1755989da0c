"""What ranks send each other: expert exchange, gradients and weights, pipeline borders, tensor and context parallelism.

Expert exchange. The trainer sends a token once to each *device* that holds one of its experts. DeepSeek's kernels send
it over the network once for each *node* and forward it inside (DeepSeek-V3 report, section 3.2.2). So the numbers that
matter are the expected distinct nodes and devices of a token's K experts. Group-limited routing keeps M of G groups of
experts, and with one group a node (V3) a token reaches at most M nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.errors import ConfigError
from benthic.plan.devices import Device

FP8_ELEMENT = 1 + 4 / 128
"""Bytes of an e4m3 activation with its share of a 4-byte scale for each 128."""
BF16_ELEMENT = 2.0


def expected_places(config: ModelConfig, places: int, group_limit: bool = True) -> float:
    """Distinct places, of `places` equal contiguous blocks of experts, that hold a chosen expert of a token.

    Exact for K experts drawn uniformly. Under the group limit each kept group is taken to be used, since it was kept
    for its best experts; `expert_load.simulate` with the model's own rule agrees within 8%.
    """
    experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    if not experts or places < 1 or experts % places:
        raise ConfigError(f"{places} places do not divide the {experts or 0} routed experts")
    held, groups, kept = experts // places, config.n_group, config.topk_group
    if not group_limit or kept >= groups:
        return places * _hit(experts, held, chosen)
    group = experts // groups
    if held >= group:
        used = min(kept, chosen)
        return places * _hit(groups, max(1, held // group), used)
    return places * kept / groups * _hit(kept * group, held, chosen)


def _hit(total: int, held: int, drawn: int) -> float:
    """Probability that `drawn` of `total`, without replacement, meet at least one of `held`."""
    return 1 - comb(total - held, drawn) / comb(total, drawn)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bytes one token sends in one direction of one layer's exchange, over the network and inside a node."""

    nodes: float
    devices: float
    network_bytes: float
    node_bytes: float

    def seconds(self, device: Device, tokens: float) -> float:
        """Time for `tokens` tokens a rank; network and node links work at the same time."""
        network = self.network_bytes / device.network_bandwidth.value
        return tokens * max(network, self.node_bytes / device.node_bandwidth.value)


def expert_exchange(
    config: ModelConfig, layout: ParallelConfig, device: Device, row_bytes: float, group_limit: bool = True
) -> Exchange:
    """Sending a token as a row of so many bytes to its experts' devices, or gathering it back: once to each device,
    wherever it is, as the trainer's all-to-all does."""
    if layout.expert == 1:
        return Exchange(1.0, 1.0, 0.0, 0.0)
    inside, nodes, reached_nodes, reached_devices = _reached(config, layout, device, group_limit)
    return Exchange(
        nodes=reached_nodes,
        devices=reached_devices,
        network_bytes=reached_devices * (1 - 1 / nodes) * row_bytes,
        node_bytes=reached_devices * (inside - 1) / layout.expert * row_bytes,
    )


def forwarded_exchange(
    config: ModelConfig, layout: ParallelConfig, device: Device, row_bytes: float, group_limit: bool = True
) -> Exchange:
    """The same by DeepSeek's own kernels: once over the network to each node, and on to devices inside it."""
    if layout.expert == 1:
        return Exchange(1.0, 1.0, 0.0, 0.0)
    inside, nodes, reached_nodes, reached_devices = _reached(config, layout, device, group_limit)
    return Exchange(
        nodes=reached_nodes,
        devices=reached_devices,
        network_bytes=reached_nodes * (1 - 1 / nodes) * row_bytes,
        node_bytes=reached_devices * (1 - 1 / inside) * row_bytes,
    )


def _reached(
    config: ModelConfig, layout: ParallelConfig, device: Device, group_limit: bool
) -> tuple[int, int, float, float]:
    """Expert ranks inside a node, nodes of them, and how many of both a token reaches."""
    inside = min(layout.expert, device.devices_per_node)
    nodes = max(1, layout.expert // inside)
    reached = expected_places(config, nodes, group_limit), expected_places(config, layout.expert, group_limit)
    return inside, nodes, *reached


def exchange_rows(config: ModelConfig, narrow: bool) -> dict[str, float]:
    """Bytes a row of each exchange of the trainer's expert layers: tokens go with their K choices, a number and a
    weight of 4 bytes each, in FP8 if `narrow`; results and all gradients are bf16."""
    states = BF16_ELEMENT * config.hidden_size
    choices = 8.0 * config.num_experts_per_tok
    return {
        "tokens": (FP8_ELEMENT * config.hidden_size if narrow else states) + choices,
        "results": states,
        "gradients of results": states,
        "gradients of tokens": states + choices,
    }


def group_bandwidth(device: Device, ranks: int) -> float:
    """Bytes/s one rank gets in a collective: the node's links while the ranks fit into a node, the network beyond."""
    inside = ranks <= device.devices_per_node
    return device.node_bandwidth.value if inside else device.network_bandwidth.value


def scatter_bytes(size: float, ranks: int) -> float:
    """Bytes a rank sends in a reduce-scatter or all-gather of `size` bytes: (n - 1) / n of them."""
    return size * (ranks - 1) / ranks


def synchronisation_bytes(
    layout: ParallelConfig, ranks: int, weight_bytes: float, gradient_bytes: float, micro_batches: int
) -> tuple[float, float]:
    """Bytes a rank sends in a step to keep copies of its parameters equal: of gradients, and of weights.

    `ranks` hold copies (or shards) of the same parameters. ZeRO 0: all-reduce of gradients. 1: reduce-scatter of
    gradients, all-gather of weights. 2: the reduce-scatter comes with each micro-batch. 3: so do two all-gathers.
    """
    scatters, gathers = _times(layout, micro_batches)
    return scatters * scatter_bytes(gradient_bytes, ranks), gathers * scatter_bytes(weight_bytes, ranks)


def _times(layout: ParallelConfig, micro_batches: int) -> tuple[int, int]:
    times = {0: (2, 0), 1: (1, 1), 2: (micro_batches, 1), 3: (micro_batches, 2 * micro_batches)}
    # Without shards (replicate alone) nothing is divided, and gradients are all-reduced once.
    return times[layout.zero if layout.shard > 1 else 0]


def synchronisation_seconds(
    layout: ParallelConfig,
    device: Device,
    ranks: int,
    weight_bytes: float,
    gradient_bytes: float,
    micro_batches: int,
) -> tuple[float, str]:
    """Seconds that `synchronisation_bytes` take, not overlapped; and the formula."""
    if ranks == 1:
        return 0.0, "one copy"
    bandwidth = group_bandwidth(device, layout.ranks_in_stage)
    seconds = sum(synchronisation_bytes(layout, ranks, weight_bytes, gradient_bytes, micro_batches)) / bandwidth
    scatters, gathers = _times(layout, micro_batches)
    formula = (
        f"({ranks} - 1) / {ranks} x ({scatters} x {gradient_bytes / 1e9:.3g} GB gradients + "
        f"{gathers} x {weight_bytes / 1e9:.3g} GB weights) / {bandwidth / 1e9:.3g} GB/s"
    )
    return seconds, formula


def border_bytes(config: ModelConfig, tokens: float) -> float:
    """Bytes that cross one pipeline border for one micro-batch in one direction: states in bf16, and beside them the
    embedding where prediction layers, on the last stage, wait for it."""
    return tokens * config.hidden_size * (2 if config.num_nextn_predict_layers else 1) * BF16_ELEMENT


def tensor_parallel_bytes(config: ModelConfig, layout: ParallelConfig, tokens: float) -> float:
    """Bytes a rank sends for one layer's forward (the backward sends as much): two all-reduces of hidden states."""
    return 2 * 2 * scatter_bytes(tokens * config.hidden_size * BF16_ELEMENT, layout.tensor)


def context_parallel_bytes(config: ModelConfig, layout: ParallelConfig, tokens: float) -> float:
    """Bytes a rank sends for one layer's forward: its keys and values (MLA: its latents) to every other rank.

    `tokens` are the rank's own. The backward sends them again, and their gradients.
    """
    return (layout.context - 1) * tokens * config.cache_width * BF16_ELEMENT
