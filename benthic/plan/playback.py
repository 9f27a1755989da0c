"""The moments of a training step on one rank, in order, as the trainer's plain path takes them.

Forward: each layer adds what it keeps; the experts' weighted sum needs the most beside it. Loss: blocks of logits,
their softmax, and the head's gradient in float32. Backward: layers in reverse free what they kept, while weight
gradients appear in the computing dtype and are added to the float32 ones (train/optimizer.py). Workspaces are those
of single operations as autograd runs them: the largest arrays alive between two kernels. A test records the
allocations of real steps and finds the same highest moment.
"""

from __future__ import annotations

from collections.abc import Iterable

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.activations import Block, Saved, element_bytes, layer_activations
from benthic.plan.holdings import Holding, Rank
from benthic.plan.ledger import Group, Ledger
from benthic.plan.pipeline import chunks_in_flight
from benthic.plan.training import LOGITS_AT_A_TIME, Training

_Groups = dict[Block, Group]


def _grouped(tensors: Iterable[Saved]) -> _Groups:
    found: dict[Block, list[Saved]] = {}
    for one in tensors:
        found.setdefault(one.block, []).append(one)
    return {block: Group(group) for block, group in found.items()}


class Playback:
    """One rank's step. `tokens` are those of a micro-batch on this rank."""

    def __init__(
        self, config: ModelConfig, training: Training, layout: ParallelConfig, held: Rank, rank: int, ledger: Ledger
    ) -> None:
        self.config, self.training, self.layout, self.held, self.ledger = config, training, layout, held, ledger
        self.tokens = training.micro_batch * training.sequence_length / layout.context / layout.tensor
        self.size = element_bytes(training.precision)
        self.width = config.hidden_size
        self.rows = 1 + training.expert_imbalance
        self.in_flight = chunks_in_flight(layout, rank, training.micro_batches) / layout.stages_per_rank
        self.have_gradient: set[str] = set()
        kinds: dict[tuple[bool, bool], tuple[_Groups, _Groups]] = {}
        self.kept: dict[int, _Groups] = {}
        self.again: dict[int, _Groups] = {}
        for layer in held.layers:
            kind = (config.is_expert_layer(layer), layer >= config.num_hidden_layers)
            if kind not in kinds:
                kinds[kind] = self._groups(layer)
            self.kept[layer], self.again[layer] = kinds[kind]

    def _groups(self, layer: int) -> tuple[_Groups, _Groups]:
        """What a layer keeps, and what it computes again in backward, by the block that frees it."""
        precision, recomputation = self.training.precision, self.training.recomputation
        kept = layer_activations(self.config, layer, precision, recomputation, self.rows)
        full = layer_activations(self.config, layer, precision, "none", self.rows)
        again = [one for one in full if one not in kept]
        return _grouped(kept), _grouped(again)

    def play(self) -> None:
        """All moments of a step; the second micro-batch finds gradients of the first."""
        if self.layout.pipeline > 1:
            # The fullest moment finds other micro-batches in flight, and gradients of those before.
            for layer in self.held.layers:
                self._keep(self.kept[layer], self.in_flight - 1)
            for name, block in self.held.blocks.items():
                self._hold_gradient(name, block)
        for _ in range(min(2, self.training.micro_batches)):
            self._forward()
            self._backward()
        self.ledger.moment("optimiser step")

    def _keep(self, groups: _Groups, times: float = 1.0) -> None:
        for group in groups.values():
            self.ledger.hold("activations", group, times * group.bytes * self.tokens)

    def _drop(self, layer: int, *blocks: Block) -> None:
        for groups in (self.kept[layer], self.again[layer]):
            self._keep({block: groups[block] for block in blocks if block in groups}, -1)

    def _bytes(self, layer: int, block: Block) -> float:
        """Bytes a token of what is kept and computed again."""
        return sum(groups[block].bytes for groups in (self.kept[layer], self.again[layer]) if block in groups)

    def _hold_gradient(self, name: str, block: Holding) -> None:
        elements = block.sharded(self.layout) if self.layout.zero >= 2 else block.elements
        self.ledger.hold("gradients", "gradients in float32", 4 * elements)
        self.have_gradient.add(name)

    def _weight_gradient(self, name: str, moment: str, **workspace: float) -> None:
        """A block's gradient appears, in the computing dtype first, and joins the float32 one."""
        block = self.held.blocks[name]
        if not block.elements:
            return
        if name not in self.have_gradient:
            self._hold_gradient(name, block)
        narrow = 0 if self.training.precision == "fp32" else self.size
        self.ledger.moment(moment, weight_gradient=narrow * block.largest, **workspace)

    def _forward(self) -> None:
        if self.held.first:
            self.ledger.hold("activations", "token numbers", 8 * self.tokens)
        for layer in self.held.layers:
            self._keep(self.kept[layer])
            again = sum(group.bytes for group in self.again[layer].values())
            workspace = (self._forward_bytes(layer) + again) * self.tokens
            self.ledger.moment(f"forward of layer {layer}", forward=workspace)
        if self.held.last:
            self.ledger.hold("activations", "final norm: input and 1 / rms", (self.width * self.size + 4) * self.tokens)
            for head in range(1 + self.config.num_nextn_predict_layers):
                self._loss(f"loss of head {head}")

    def _forward_bytes(self, layer: int) -> float:
        """Bytes a token beyond what is kept, at the experts' weighted sum (the shared expert comes after it)."""
        if not self.config.is_expert_layer(layer):
            return 2 * self.width * self.size
        output = 2 * self.size if self.training.precision == "fp8" else self.size + 4
        wide = self.config.num_experts_per_tok * self.rows * self.width * output
        return max(0.0, wide - self._bytes(layer, "shared"))

    def _loss(self, what: str) -> None:
        size, all_tokens = self.size, self.tokens * self.layout.tensor
        weight = self.config.vocab_size * self.width / self.layout.tensor
        rows = min(all_tokens, max(1, LOGITS_AT_A_TIME // self.config.vocab_size))
        block = rows * self.config.vocab_size / self.layout.tensor
        hold, moment = self.ledger.hold, self.ledger.moment
        hold("activations", "loss: gradient of the states", self.width * size * self.tokens)
        states = self.width * size * self.tokens
        # Logits, the same in float32, and their softmax; from the second block on, the gradient of the one before.
        logits = 8 if self.training.precision == "fp32" else size + 8
        before = size * block * (all_tokens > rows)
        moment(what, logits=logits * block + before, head_gradient=4 * weight, final_states=states)
        product = 0 if self.training.precision == "fp32" else size * weight
        moment(what, logits=2 * size * block, head_gradient=4 * weight + product, final_states=states)
        hold("activations", "loss: gradient of the head", size * weight)

    def _backward(self) -> None:
        if self.held.last:
            self._loss_backward()
        for layer in reversed(self.held.layers):
            self._layer_backward(layer)
        if self.held.first:
            self._weight_gradient("embedding", "backward of the embedding", states=self.width * self.size * self.tokens)
            self.ledger.hold("activations", "token numbers", -8 * self.tokens)

    def _loss_backward(self) -> None:
        heads = 1 + self.config.num_nextn_predict_layers
        weight = self.size * self.config.vocab_size * self.width / self.layout.tensor
        states = self.size * self.width * self.tokens
        # What the loss kept is scaled by the gradient of the loss: a second copy of each.
        self.ledger.moment("backward of the loss", scaled_gradients=weight + states)
        self.ledger.hold("activations", "loss: gradient of the head", -heads * weight)
        self.ledger.hold("activations", "loss: gradient of the states", -heads * states)
        self._weight_gradient("head", "backward of the head", states=heads * states)
        kept = (self.width * self.size + 4) * self.tokens
        self.ledger.hold("activations", "final norm: input and 1 / rms", -kept)

    def _layer_backward(self, layer: int) -> None:
        self._keep(self.again[layer])
        what = f"backward of layer {layer}"
        states = 2 * self.width * self.size * self.tokens
        if self.config.is_expert_layer(layer):
            self._experts_backward(layer, what, states)
        else:
            # Gradients of gate, up and product; the product itself is no longer needed.
            inner = 2 * self.config.intermediate_size * self.size * self.tokens
            self.ledger.moment(what, states=states, feed_forward=inner)
        self._drop(layer, "feed_forward")
        self._weight_gradient(f"feed_forward {layer}", f"{what}, feed-forward", states=states)
        heads, key, value = self.config.num_attention_heads, self.config.query_head_dim, self.config.value_head_dim
        # Gradients of query, key, value and output, and the query's sum in float32.
        core = heads * (key * (2 * self.size + 4) + 2 * value * self.size) * self.tokens
        self.ledger.moment(f"{what}, attention", states=states, attention=core)
        self._drop(layer, "attention", "prediction")
        self._weight_gradient(f"attention {layer}", f"{what}, attention", states=states)

    def _experts_backward(self, layer: int, what: str, states: float) -> None:
        size = self.size
        chosen, inner = self.config.num_experts_per_tok * self.rows * self.tokens, self.config.moe_intermediate_size
        self._drop(layer, "shared")
        # The rows' gradient, and the product that the routing weights' gradient is summed from, both in float32.
        element = size if self.training.precision == "fp8" else 4
        summed = 4 * self.width * self.tokens
        self.ledger.moment(f"{what}, weighted sum", states=states + summed, rows=2 * element * chosen * self.width)
        self._drop(layer, "expert outputs")
        # gate_up_proj's two products: its inputs are still there, and so is down_proj's gradient; then it joins.
        block = self.held.blocks[f"experts {layer}"]
        narrow = 0 if self.training.precision == "fp32" else size
        fresh = f"experts {layer}" not in self.have_gradient
        gradients = narrow * block.largest + 4 * fresh * (block.elements - block.largest)
        rows, hidden = chosen * self.width * size, 2 * chosen * inner * size
        self.ledger.moment(f"{what}, experts", states=states, rows=rows + hidden, weight_gradient=gradients)
        self._drop(layer, "expert inputs")
        self._weight_gradient(f"experts {layer}", f"{what}, experts", states=states, rows=rows)
