"""The moments of a training step on one rank, in order, as the trainer's plain path takes them.

Forward: each layer adds what it keeps; the experts' weighted sum needs the most beside it. Loss: blocks of logits,
their log-softmax, and the head's gradient in float32. Backward: layers in reverse free what they kept, while weight
gradients appear in the computing dtype and are added to the float32 ones (train/optimizer.py). Workspaces are those
of single operations as autograd runs them: the largest arrays alive between two kernels. A test records the
allocations of real steps and finds the same highest moment.
"""

from __future__ import annotations

from collections.abc import Sequence

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.activations import Saved, element_bytes, layer_activations, prediction_activations
from benthic.plan.holdings import Holding, Rank
from benthic.plan.ledger import Ledger
from benthic.plan.pipeline import chunks_in_flight
from benthic.plan.training import Training

LOGITS_AT_A_TIME = 1 << 27
"""Logits the loss holds in a block on a GPU (ops/linear_cross_entropy.py)."""


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
        self.kept = {layer: self._kept(layer) for layer in held.layers}
        self.full = {
            layer: layer_activations(config, layer, training.precision, "none", self.rows) for layer in held.layers
        }

    def _kept(self, layer: int) -> list[Saved]:
        precision, recomputation = self.training.precision, self.training.recomputation
        own = layer_activations(self.config, layer, precision, recomputation, self.rows)
        if layer < self.config.num_hidden_layers:
            return own
        return [*prediction_activations(self.config, precision, recomputation), *own]

    def play(self) -> None:
        """All moments of a step; the second micro-batch finds gradients of the first."""
        if self.layout.pipeline > 1:
            # The fullest moment finds other micro-batches in flight, and gradients of those before.
            for layer in self.held.layers:
                for one in self.kept[layer]:
                    self._keep(one, self.in_flight - 1)
            for name, block in self.held.blocks.items():
                self._hold_gradient(name, block)
        for _ in range(min(2, self.training.micro_batches)):
            self._forward()
            self._backward()
        self.ledger.moment("optimiser step")

    def _keep(self, one: Saved, times: float = 1.0) -> None:
        self.ledger.hold("activations", one.name, times * one.bytes * self.tokens)

    def _drop(self, tensors: Sequence[Saved], *prefixes: str) -> None:
        for one in tensors:
            if one.name.startswith(prefixes):
                self._keep(one, -1)

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
            for one in self.kept[layer]:
                self._keep(one)
            again = sum(one.bytes for one in self.full[layer]) - sum(one.bytes for one in self.kept[layer])
            workspace = (self._forward_bytes(layer) + max(0.0, again)) * self.tokens
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
        return max(0.0, wide - sum(one.bytes for one in self.full[layer] if one.name.startswith("shared")))

    def _loss(self, what: str) -> None:
        size, all_tokens = self.size, self.tokens * self.layout.tensor
        weight = self.config.vocab_size * self.width / self.layout.tensor
        rows = min(all_tokens, max(1, LOGITS_AT_A_TIME // self.config.vocab_size))
        block = rows * self.config.vocab_size / self.layout.tensor
        hold, moment = self.ledger.hold, self.ledger.moment
        hold("activations", "loss: gradient of the states", self.width * size * self.tokens)
        states = self.width * size * self.tokens
        # Logits, the same in float32, and their log-softmax; from the second block on, the block before is still
        # referred to.
        logits = 8 if self.training.precision == "fp32" else size + 8
        before = (size + 4) * block * (all_tokens > rows)
        moment(what, logits=logits * block + before, head_gradient=4 * weight, final_states=states)
        product = 0 if self.training.precision == "fp32" else size * weight
        moment(what, logits=(size + 4) * block, head_gradient=4 * weight + product, final_states=states)
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
        full, kept = self.full[layer], self.kept[layer]
        present = {one.name for one in kept}
        for one in full:
            if one.name not in present:
                self._keep(one)
        what = f"backward of layer {layer}"
        states = 2 * self.width * self.size * self.tokens
        if self.config.is_expert_layer(layer):
            self._experts_backward(layer, what, states)
        else:
            # Gradients of gate, up and product; the product itself is no longer needed.
            inner = 2 * self.config.intermediate_size * self.size * self.tokens
            self.ledger.moment(what, states=states, feed_forward=inner)
        rest = [one for one in full if one.block == "feed_forward" and not one.name.startswith(("routed", "shared"))]
        self._drop(rest, "")
        self._weight_gradient(f"feed_forward {layer}", f"{what}, feed-forward", states=states)
        heads, key, value = self.config.num_attention_heads, self.config.query_head_dim, self.config.value_head_dim
        # Gradients of query, key, value and output, and the query's sum in float32.
        core = heads * (key * (2 * self.size + 4) + 2 * value * self.size) * self.tokens
        self.ledger.moment(f"{what}, attention", states=states, attention=core)
        self._drop([one for one in full if one.block == "attention"], "")
        self._drop(kept, "prediction")
        self._weight_gradient(f"attention {layer}", f"{what}, attention", states=states)

    def _experts_backward(self, layer: int, what: str, states: float) -> None:
        full, size = self.full[layer], self.size
        chosen, inner = self.config.num_experts_per_tok * self.rows * self.tokens, self.config.moe_intermediate_size
        self._drop(full, "shared")
        # The rows' gradient, and the product that the routing weights' gradient is summed from, both in float32.
        element = size if self.training.precision == "fp8" else 4
        summed = 4 * self.width * self.tokens
        self.ledger.moment(f"{what}, weighted sum", states=states + summed, rows=2 * element * chosen * self.width)
        self._drop(full, "routed: output", "routed: silu")
        # gate_up_proj's two products: its inputs are still there, and so is down_proj's gradient; then it joins.
        block = self.held.blocks[f"experts {layer}"]
        narrow = 0 if self.training.precision == "fp32" else size
        fresh = f"experts {layer}" not in self.have_gradient
        gradients = narrow * block.largest + 4 * fresh * (block.elements - block.largest)
        rows, hidden = chosen * self.width * size, 2 * chosen * inner * size
        self.ledger.moment(f"{what}, experts", states=states, rows=rows + hidden, weight_gradient=gradients)
        self._drop(full, "routed: input", "routed: gate")
        self._weight_gradient(f"experts {layer}", f"{what}, experts", states=states, rows=rows)
