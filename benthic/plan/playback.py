"""The moments of a training step on one rank, in order, as the trainer takes them on a GPU.

Forward: each layer adds what it keeps; experts need the most beside it. Loss: blocks of logits, whose gradient takes
their place, and from them the head's. Backward: layers in reverse free what they kept, while weight gradients appear.
A lone micro-batch's stay as they are; the second one's are added to the first's in float32 (train/optimizer.py).
Workspaces are those of single operations: the largest arrays alive between two kernels. A test records the allocations
of real steps and finds the same highest moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from benthic.config.model import ModelConfig
from benthic.config.parallel import ParallelConfig
from benthic.plan.activations import Block, Saved, element_bytes, fp8_row, layer_activations
from benthic.plan.holdings import Rank
from benthic.plan.ledger import Group, Ledger
from benthic.plan.pipeline import chunks_in_flight
from benthic.plan.training import Training

_Groups = dict[Block, Group]
_FULL = 4.0
"""Bytes of a gradient that several micro-batches, or ranks, add up."""


def _grouped(tensors: Iterable[Saved]) -> _Groups:
    found: dict[Block, list[Saved]] = {}
    for one in tensors:
        found.setdefault(one.block, []).append(one)
    return {block: Group(group) for block, group in found.items()}


class Playback:
    """One rank's step. `tokens` are those of a micro-batch on this rank; the loss holds `logits` at a time."""

    def __init__(
        self,
        config: ModelConfig,
        training: Training,
        layout: ParallelConfig,
        held: Rank,
        rank: int,
        ledger: Ledger,
        logits: int,
    ) -> None:
        self.config, self.training, self.layout, self.held, self.ledger = config, training, layout, held, ledger
        self.tokens = training.micro_batch * training.sequence_length / layout.context / layout.tensor
        self.logits = logits
        self.size = element_bytes(training.precision)
        self.states = config.hidden_size * self.size * self.tokens
        self.rows = 1 + training.expert_imbalance
        self.in_flight = chunks_in_flight(layout, rank, training.micro_batches) / layout.stages_per_rank
        # Bytes an element of each block's gradient.
        self.gradients: dict[str, float] = {}
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
        """All moments of a step. The second micro-batch finds the first's gradients, the third their sum."""
        if self.layout.pipeline > 1:
            # The fullest moment finds other micro-batches in flight, and gradients of those before.
            for layer in self.held.layers:
                self._keep(self.kept[layer], self.in_flight - 1)
            for name in self.held.blocks:
                self._hold_gradient(name, _FULL)
        for _ in range(min(3, self.training.micro_batches)):
            self._forward()
            self._backward()
        self.ledger.moment("optimiser step")

    def _keep(self, groups: _Groups, times: float = 1.0) -> None:
        for group in groups.values():
            self.ledger.hold("activations", group, times * group.bytes * self.tokens)

    def _make_again(self, layer: int, *blocks: Block) -> None:
        """What the backward of `blocks` needs is there again; of a whole layer everything at once."""
        groups = self.again[layer]
        if self.training.recomputation == "layer":
            if "experts" in blocks:
                self._keep(groups)
        else:
            self._keep({block: groups[block] for block in blocks if block in groups})

    def _drop(self, layer: int, *blocks: Block) -> None:
        for groups in (self.kept[layer], self.again[layer]):
            self._keep({block: groups[block] for block in blocks if block in groups}, -1)

    def _hold_gradient(self, name: str, each: float) -> None:
        block = self.held.blocks[name]
        layout = self.layout
        # A lone micro-batch's gradients are split as they come, except in a pipeline.
        split = layout.zero + (self.training.micro_batches == layout.pipeline == 1) >= 2
        elements = block.sharded(layout) if split else block.elements
        self.ledger.hold("gradients", "gradients", (each - self.gradients.get(name, 0.0)) * elements)
        self.gradients[name] = each

    def _weight_gradient(self, name: str, moment: str, together: bool = False, **workspace: float) -> None:
        """A block's gradient appears, tensor by tensor or all `together`, and joins that of micro-batches before."""
        block = self.held.blocks[name]
        if not block.elements:
            return
        before = self.gradients.get(name, 0.0)
        fresh = self.size * (block.elements if together else block.largest)
        if not before and self._stays(name):
            # As its product wrote it: nothing is copied.
            self._hold_gradient(name, self.size)
            self.ledger.moment(moment, **workspace)
            return
        self._hold_gradient(name, _FULL)
        if 0 < before < _FULL:
            # Of the tensor that is added last, what was there and what is new, beside their sum.
            fresh = 2 * self.size * block.largest
        self.ledger.moment(moment, weight_gradient=fresh if self.size < _FULL or before else 0, **workspace)

    def _stays(self, name: str) -> bool:
        """Whether a first micro-batch's gradient of a block is kept in the dtype it was computed in."""
        alone = self.layout.world == 1 or (self.layout.lone_experts and name.startswith("experts"))
        return self.size == _FULL or alone

    def _forward(self) -> None:
        if self.held.first:
            self.ledger.hold("activations", "token numbers", 8 * self.tokens)
        for layer in self.held.layers:
            self._keep(self.kept[layer])
            again = sum(group.bytes for group in self.again[layer].values())
            workspace = (self._forward_bytes(layer) + again) * self.tokens
            self.ledger.moment(f"forward of layer {layer}", forward=workspace)
        if self.held.last:
            self.ledger.hold("activations", "final norm: input and 1 / rms", self.states + 4 * self.tokens)
            for head in range(1 + self.config.num_nextn_predict_layers):
                self._loss(f"loss of head {head}")

    def _forward_bytes(self, layer: int) -> float:
        """Bytes a token beyond what is kept, where a feed-forward needs the most."""
        fp8 = self.training.precision == "fp8"
        expert = self.config.is_expert_layer(layer)
        width = self.config.hidden_size
        inner = self.config.moe_intermediate_size if expert else self.config.intermediate_size
        chosen = self.config.num_experts_per_tok * self.rows if expert else 1.0
        if fp8:
            # What was read, gate and up as the product left them, and the activation.
            read = fp8_row(width) if expert else 0
            return chosen * (read + 2 * self.size * inner + fp8_row(inner)) + width * self.size
        if not expert:
            return 2 * width * self.size
        # Activation and output of the rows; the shared expert comes after them.
        shared = sum(one["shared"].bytes for one in (self.kept[layer], self.again[layer]) if "shared" in one)
        return max(0.0, chosen * (inner + width) * self.size - shared)

    def _loss(self, what: str) -> None:
        size, all_tokens, classes = self.size, self.tokens * self.layout.tensor, self.config.vocab_size
        weight = classes * self.config.hidden_size / self.layout.tensor
        blocks = max(1, math.ceil(all_tokens * classes / self.logits))
        logits = size * math.ceil(all_tokens / blocks) * classes / self.layout.tensor
        states = (1 + self.config.num_nextn_predict_layers) * self.states
        hold, moment = self.ledger.hold, self.ledger.moment
        hold("activations", "loss: gradient of the states", self.states)
        # Of several blocks, the sum and what is added to it are float32.
        product = size * weight if blocks == 1 else 2 * _FULL * weight
        moment(what, logits=logits, head_gradient=product, final_states=states)
        if blocks > 1 and size < _FULL:
            moment(what, head_gradient=(_FULL + size) * weight, final_states=states)
        hold("activations", "loss: gradient of the head", size * weight)

    def _backward(self) -> None:
        if self.held.last:
            self._loss_backward()
        for layer in reversed(self.held.layers):
            self._layer_backward(layer)
            if layer == self.config.num_hidden_layers:
                self.ledger.hold("activations", "predictions: gradient of the embedding", self.states)
        if self.config.num_hidden_layers in self.held.layers:
            # It waits for the first layer's.
            self.ledger.hold("activations", "predictions: gradient of the embedding", -self.states)
        if self.held.first:
            self._weight_gradient("embedding", "backward of the embedding", states=self.states)
            self.ledger.hold("activations", "token numbers", -8 * self.tokens)
            if self.held.last and self.config.tie_word_embeddings:
                self.ledger.hold("activations", "loss: gradient of the head", -self._head_bytes())

    def _head_bytes(self) -> float:
        return self.size * self.config.vocab_size * self.config.hidden_size / self.layout.tensor

    def _loss_backward(self) -> None:
        heads = 1 + self.config.num_nextn_predict_layers
        # A tied head's gradient waits for the embedding's.
        waiting = 1 if self.held.first and self.config.tie_word_embeddings else 0
        self.ledger.moment("backward of the loss", states=self.states)
        self.ledger.hold("activations", "loss: gradient of the head", (waiting - heads) * self._head_bytes())
        self.ledger.hold("activations", "loss: gradient of the states", -heads * self.states)
        self._weight_gradient("head", "backward of the head", states=(heads + 1) * self.states)
        self.ledger.hold("activations", "final norm: input and 1 / rms", -self.states - 4 * self.tokens)

    def _layer_backward(self, layer: int) -> None:
        what = f"backward of layer {layer}"
        states = 2 * self.states
        # In FP8 a norm's output is the router's input alone, which comes after the experts.
        late = self.training.precision == "fp8"
        self._make_again(layer, "shared", "experts", *(() if late else ("feed_forward",)))
        if self.config.is_expert_layer(layer):
            # What is shared comes first.
            self._drop(layer, "shared")
            self._weight_gradient(f"feed_forward {layer}", f"{what}, shared expert", states=states)
            self._experts_backward(layer, what, states)
            if late:
                self._make_again(layer, "feed_forward")
            self._drop(layer, "feed_forward")
        else:
            self.ledger.moment(what, states=states, feed_forward=self._dense_bytes() * self.tokens)
            self._drop(layer, "feed_forward")
            self._weight_gradient(f"feed_forward {layer}", f"{what}, feed-forward", states=states)
        self._make_again(layer, "attention", "prediction")
        heads, key, value = self.config.num_attention_heads, self.config.query_head_dim, self.config.value_head_dim
        # Gradients of query, key, value and output, and the query's sum in float32.
        core = heads * (key * (2 * self.size + 4) + 2 * value * self.size)
        if self.training.recomputation == "up_projections" and self.config.kv_lora_rank:
            # A query's projection stays until all heads are made again.
            core += heads * key * self.size
        self.ledger.moment(f"{what}, attention", states=states, attention=core * self.tokens)
        self._drop(layer, "attention", "prediction")
        self._weight_gradient(f"attention {layer}", f"{what}, attention", states=states)

    def _dense_bytes(self) -> float:
        """Bytes a token of a dense feed-forward's backward beyond what is kept."""
        inner, size = self.config.intermediate_size, self.size
        if self.training.precision != "fp8":
            # Gradients of gate, up and activation; the activation itself is no longer needed.
            return 2 * inner * size
        return inner * size + self._fp8_gradients(inner)

    def _fp8_gradients(self, inner: int) -> float:
        """Bytes a row of what SwiGLU's backward writes in FP8: gradients of gate and up, and the activation again.
        Where a scale would reach over the border of gate and up, they are bfloat16 first."""
        across = 0 if inner % 128 == 0 else 2 * inner * self.size
        return across + 3 * fp8_row(inner)

    def _experts_backward(self, layer: int, what: str, states: float) -> None:
        block = self.held.blocks[f"experts {layer}"]
        first, second = self._expert_rows(block.elements and self.config.n_routed_experts / self.layout.expert)
        self.ledger.moment(f"{what}, experts", states=states, rows=first)
        # Both weights' gradients, as their products wrote them.
        gradients = self.size * block.elements
        states += self.states  # the input's gradient, summed over choices
        self.ledger.moment(f"{what}, experts' weights", states=states, rows=second, weight_gradient=gradients)
        self._drop(layer, "experts")
        self._weight_gradient(f"experts {layer}", f"{what}, experts", together=True, states=states)

    def _expert_rows(self, experts: float) -> tuple[float, float]:
        """Bytes of rows beyond those that are kept: where SwiGLU's gradient is made, and at the last product."""
        width, inner, size = self.config.hidden_size, self.config.moe_intermediate_size, self.size
        rows = self.config.num_experts_per_tok * self.rows * self.tokens
        if self.training.precision != "fp8":
            # Output's gradient, activation and its gradient, gate's and up's; then those two and the input's rows.
            return rows * (width + 4 * inner) * size, rows * (width + 2 * inner) * size
        first = rows * (fp8_row(width) + inner * size + self._fp8_gradients(inner))
        # Cut anew down the tokens, every expert's rows are filled up to whole blocks of 128: input and output's
        # gradient, and the activation.
        filled = rows + 128 * experts
        return first, rows * 3 * fp8_row(inner) + filled * (2 * fp8_row(width) + fp8_row(inner))
