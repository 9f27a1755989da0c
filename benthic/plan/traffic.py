"""What the trainer's plain path moves through memory beside matrix products and attention, kernel by kernel.

Every operation is one torch kernel that reads its inputs and writes its outputs; bytes are reads + writes of a token,
in elements of the computing dtype, `b` bytes, or of float32, 4 bytes. Arrays of T rows are counted, and of the rest
what is launched. A test holds the list against every operation that autograd runs on a model without memory.
"""

from __future__ import annotations

from collections.abc import Iterator

from benthic.config.model import ModelConfig
from benthic.plan.activations import element_bytes
from benthic.plan.fused_traffic import fused_layer, fused_loss
from benthic.plan.kernels import Kernels, Phase
from benthic.plan.training import TrainingPrecision


def layer_traffic(config: ModelConfig, layer: int, precision: TrainingPrecision) -> list[Kernels]:
    """Everything memory-bound in one layer, bytes a token."""
    if precision == "fp8":
        return list(fused_layer(config, layer))
    b, width = element_bytes(precision), config.hidden_size
    attention = _latent(config, b) if config.kv_lora_rank else _plain(config, b)
    expert = config.is_expert_layer(layer)
    feed_forward = _experts(config, b) if expert else _gated(config, config.intermediate_size, b)
    found = [*attention, *feed_forward, *_biases(config, b)]
    for block in ("attention", "feed_forward"):
        found += _norm(block, "norm", width, b)
        # Forward adds the sublayer's result, backward the gradients of both ways.
        found += [Kernels(block, "residual sum", phase, "elementwise", 3 * b * width) for phase in _PHASES]
    if layer >= config.num_hidden_layers:
        found += _prediction(width, b)
    return found


_PHASES: tuple[Phase, Phase] = ("forward", "backward")


def embedding_traffic(config: ModelConfig, precision: TrainingPrecision) -> list[Kernels]:
    """Looking rows up, and adding their gradients after a sort, bytes a token."""
    row = element_bytes(precision) * config.hidden_size
    return [
        Kernels("embedding", "lookup", "forward", "gather", 2 * row),
        Kernels("embedding", "gradient", "backward", "scatter_add", 3 * row, launches=12),
    ]


def head_traffic(config: ModelConfig, precision: TrainingPrecision, blocks: int) -> list[Kernels]:
    """The final norm and one head's loss in `blocks` of rows, bytes a token."""
    if precision == "fp8":
        return fused_loss(config)
    b, classes = element_bytes(precision), config.vocab_size
    loss = [
        Kernels("head", "softmax", "forward", "softmax", (b + 4) * classes, blocks),
        Kernels("head", "largest logit and probability", "forward", "reduction", (b + 4) * classes, 2 * blocks),
        Kernels("head", "losses and targets", "forward", "elementwise", 0.0, 12 * blocks),
        Kernels("head", "masked rows and gradient", "forward", "elementwise", 4 * b * config.hidden_size, 2 * blocks),
        Kernels("head", "scaled gradient", "backward", "elementwise", 2 * b * config.hidden_size),
    ]
    if precision == "bf16":
        loss.append(Kernels("head", "gradient of logits", "forward", "narrow", (4 + b) * classes, blocks))
    return [*loss, *_norm("head", "final norm", config.hidden_size, b)]


def head_weight_traffic(precision: TrainingPrecision, blocks: int, heads: int) -> list[Kernels]:
    """The gradient of all `heads`' shared matrix beside its products, bytes an element: cleared and added up in
    float32 block by block, cast, scaled by the loss's own gradient, and joined with the other heads'."""
    if precision == "fp8":
        return []
    b = 4 if precision == "fp32" else 2
    found = [
        Kernels("head", "gradient cleared", "forward", "elementwise", 4.0 * heads, heads),
        Kernels("head", "gradient scaled", "backward", "elementwise", 2.0 * b * heads, heads),
    ]
    if precision == "bf16":
        found.append(
            Kernels("head", "blocks added up", "forward", "accumulate", (2 + 8) * blocks * heads, blocks * heads)
        )
        found.append(Kernels("head", "gradient in bfloat16", "forward", "narrow", (4 + 2) * heads, heads))
    if heads > 1:
        found.append(Kernels("head", "heads added up", "backward", "elementwise", 3 * b * (heads - 1), heads - 1))
    return found


def embedding_weight_traffic(precision: TrainingPrecision) -> list[Kernels]:
    """The embedding's gradient is cleared: bytes an element."""
    return [Kernels("embedding", "gradient cleared", "backward", "elementwise", float(element_bytes(precision)))]


def update_traffic(precision: TrainingPrecision) -> list[Kernels]:
    """The optimiser's step, bytes an element: clipping, AdamW (4 read, 3 written), the compute copy."""
    found = [
        Kernels("update", "norm of the gradient", "forward", "reduction", 4),
        Kernels("update", "clipped gradient", "forward", "optimizer", 8),
        Kernels("update", "AdamW", "forward", "optimizer", 7 * 4),
    ]
    if precision != "fp32":
        found.append(Kernels("update", "bfloat16 copy of the weights", "forward", "narrow", 4 + 2))
    return found


def accumulation_traffic(precision: TrainingPrecision, micro_batches: int) -> list[Kernels]:
    """Adding a micro-batch's weight gradients to the float32 ones, mean bytes an element: a step's first are cast, or
    in float32 taken as they are."""
    if precision == "fp8":
        return [Kernels("update", "gradients added up", "backward", "elementwise", 2 + 2 * 4)]
    later = (micro_batches - 1) / micro_batches
    if precision == "fp32":
        return [Kernels("update", "gradients added up", "backward", "elementwise", 3 * 4 * later)]
    return [
        Kernels("update", "first gradients in float32", "backward", "widen", (2 + 4) * (1 - later)),
        Kernels("update", "gradients added up", "backward", "accumulate", (2 + 2 * 4) * later),
    ]


def _norm(block: str, name: str, width: float, b: int) -> Iterator[Kernels]:
    # x to y; backward reads gradient and x twice (input and gain), writes one.
    yield Kernels(block, name, "forward", "norm", 2 * b * width, role="norm")
    yield Kernels(block, name, "backward", "norm", 5 * b * width, launches=2, role="norm")


def _latent(config: ModelConfig, b: int) -> Iterator[Kernels]:
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank or 0, config.qk_rope_head_dim
    if config.q_lora_rank:
        yield from _norm("attention", "norm of the query latent", config.q_lora_rank, b)
    yield from _norm("attention", "norm of the latent", latent, b)
    query, rotary = heads * config.query_head_dim, (heads + 1) * turned
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield Kernels("attention", "rotary parts joined", "forward", "join", 2 * b * rotary, role="expanded")
    yield from _rotation(config, rotary, b, "expanded")
    # The key's rotary part is one for all heads: read once.
    joined = 2 * b * query + b * (query + heads * config.qk_nope_head_dim + turned)
    yield Kernels("attention", "query and key joined", "forward", "join", joined, 2, "expanded")
    yield Kernels("attention", "rotary key summed over heads", "backward", "reduction", b * (heads + 1) * turned)
    # What was split forward has its gradients joined.
    split = 2 * b * (expanded + query + latent + turned + rotary)
    yield Kernels("attention", "gradients joined", "backward", "join", split, 4)
    yield Kernels("attention", "gradients of the input added", "backward", "elementwise", 3 * b * config.hidden_size)


def _plain(config: ModelConfig, b: int) -> Iterator[Kernels]:
    query = config.num_attention_heads * config.query_head_dim
    key = config.num_key_value_heads * config.query_head_dim
    if config.qk_norm:
        yield from _norm("attention", "norm of the query", query, b)
        yield from _norm("attention", "norm of the key", key, b)
    for width in (query, key):
        yield from _rotation(config, width, b, "attention")
    width = 2 * 3 * b * config.hidden_size
    yield Kernels("attention", "gradients of the input added", "backward", "elementwise", width, 2)


def _biases(config: ModelConfig, b: int) -> Iterator[Kernels]:
    # Products add them; their gradients are sums over tokens.
    if config.qkv_bias and config.kv_lora_rank:
        widths = config.kv_lora_rank + config.qk_rope_head_dim + (config.q_lora_rank or 0)
        yield Kernels("attention", "gradients of biases", "backward", "reduction", b * widths, 2)
    elif config.qkv_bias:
        widths = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.query_head_dim
        yield Kernels("attention", "gradients of biases", "backward", "reduction", b * widths, 3)
    if config.output_bias:
        yield Kernels("attention", "gradient of the output's bias", "backward", "reduction", b * config.hidden_size)


def _rotation(config: ModelConfig, width: float, b: int, role: str) -> Iterator[Kernels]:
    # A complex number is two float32 channels.
    for phase in _PHASES:
        if b < 4:
            yield Kernels("attention", "rotation: to float32", phase, "widen", (b + 4) * width, role=role)
            yield Kernels("attention", "rotation: from float32", phase, "narrow", (b + 4) * width, role=role)
        yield Kernels("attention", "rotation", phase, "broadcast", (4 + 4) * width, role=role)
    if config.rope_interleave:
        return
    # Halves are made complex and their real and imaginary parts joined. Backward clears and fills a complex array for
    # each part, adds the two, and joins the halves' gradients.
    yield Kernels("attention", "rotation: halves to complex", "forward", "strided", (4 + 4) * width, role=role)
    yield Kernels("attention", "rotation: parts joined", "forward", "join", (4 + 4) * width, role=role)
    yield Kernels("attention", "rotation: parts cleared", "backward", "elementwise", 2 * 4 * width, 2, role)
    yield Kernels("attention", "rotation: parts added", "backward", "elementwise", 3 * 4 * width, role=role)
    yield Kernels("attention", "rotation: parts filled", "backward", "strided", 2 * (2 + 2) * width, 2, role)
    yield Kernels("attention", "rotation: halves joined", "backward", "join", (4 + 4) * width, role=role)


def _gated(config: ModelConfig, inner: float, b: int) -> Iterator[Kernels]:
    # silu: 1 read, 1 written; product: 2 read, 1 written. Backward: two products, silu's own, and the sum of the
    # input's gradients through gate and up.
    yield Kernels("feed_forward", "silu(gate) * up", "forward", "elementwise", 5 * b * inner, 2, "gated")
    yield Kernels("feed_forward", "silu(gate) * up", "backward", "elementwise", 9 * b * inner, 3, "gated")
    added = 3 * b * config.hidden_size
    yield Kernels("feed_forward", "gradients of the input added", "backward", "elementwise", added)


def _experts(config: ModelConfig, b: int) -> Iterator[Kernels]:
    width, chosen = config.hidden_size, config.num_experts_per_tok
    rows, inner = chosen * width, chosen * config.moe_intermediate_size
    yield from _router(config, b)
    yield Kernels("feed_forward", "rows to experts", "forward", "gather", 2 * b * rows, routed=True)
    # Backward of a gather: the sum is cleared, and each row read and added to what is there.
    yield Kernels("feed_forward", "rows' gradients cleared", "backward", "elementwise", b * (width + rows), 2)
    yield Kernels("feed_forward", "rows to experts", "backward", "scatter_add", 3 * b * rows, routed=True)
    # Gate and up are halves of one array: every other stretch of a row.
    yield Kernels("feed_forward", "silu(gate) * up of rows", "forward", "strided", 5 * b * inner, 2, "gated")
    yield Kernels("feed_forward", "silu(gate) * up of rows", "backward", "strided", 6 * b * inner, 2)
    yield Kernels("feed_forward", "gradient of up", "backward", "elementwise", 3 * b * inner)
    yield Kernels("feed_forward", "gradients of gate and up joined", "backward", "elementwise", 4 * b * inner)
    yield Kernels("feed_forward", "rows back", "forward", "gather", 2 * b * rows, routed=True)
    yield Kernels("feed_forward", "rows back", "backward", "scatter_add", 3 * b * rows, routed=True)
    yield from _weighted_sum(width, rows, b)
    # The input's gradients through router and rows.
    yield Kernels("feed_forward", "gradients of the input added", "backward", "elementwise", 3 * b * width)
    if config.n_shared_experts:
        yield from _gated(config, config.n_shared_experts * config.moe_intermediate_size, b)
        yield Kernels("feed_forward", "sum with shared expert", "forward", "elementwise", 3 * b * width)
        yield Kernels("feed_forward", "sum with shared expert", "backward", "elementwise", 3 * b * width)


def _router(config: ModelConfig, b: int) -> Iterator[Kernels]:
    experts, chosen, width = config.n_routed_experts or 0, config.num_experts_per_tok, config.hidden_size
    if b < 4:
        # Tokens and the router's weight in float32, and their gradients back.
        yield Kernels("feed_forward", "router: to float32", "forward", "widen", (b + 4) * width, 2)
        yield Kernels("feed_forward", "router: from float32", "backward", "narrow", (b + 4) * width, 2)
    groups = 7 if config.topk_group < config.n_group else 0
    # Scores, bias, choice, weights; counts, sorting by expert and its inverse: small arrays, many launches.
    yield Kernels("feed_forward", "scores and choice", "forward", "elementwise", 6 * 4 * experts, 9 + groups)
    yield Kernels("feed_forward", "sorting rows by expert", "forward", "elementwise", 8 * 8 * 4 * chosen, 22)
    normalised = 8 if config.norm_topk_prob else 0
    yield Kernels("feed_forward", "scores", "backward", "elementwise", 6 * 4 * experts, 4 + normalised)


def _weighted_sum(width: float, rows: float, b: int) -> Iterator[Kernels]:
    # In float32. Backward: the gradient spread over rows, its product with the rows for the weights, summed.
    if b < 4:
        for phase, wide, narrow in (("forward", rows, width), ("backward", width, rows)):
            yield Kernels("feed_forward", "weighted sum: to float32", phase, "widen", (b + 4) * wide)
            yield Kernels("feed_forward", "weighted sum: from float32", phase, "narrow", (b + 4) * narrow)
    yield Kernels("feed_forward", "weighted sum: products", "forward", "broadcast", 8 * rows)
    yield Kernels("feed_forward", "weighted sum", "forward", "reduction", 4 * (rows + width))
    yield Kernels("feed_forward", "weighted sum: products", "backward", "broadcast", 12 * rows + 8 * width, 2)
    yield Kernels("feed_forward", "weighted sum", "backward", "reduction", 4 * rows)


def _prediction(width: float, b: int) -> Iterator[Kernels]:
    # Two norms, their join, the last norm; backward pads what was cut off and adds it to the main model's.
    for name in ("norm of the embedding", "norm of the state", "last norm"):
        yield from _norm("prediction", name, width, b)
    yield Kernels("prediction", "norms joined", "forward", "elementwise", 4 * b * width)
    yield Kernels("prediction", "gradients padded and added", "backward", "elementwise", 2 * (3 + 3) * b * width, 6)
