"""What a training step on a GPU moves through memory beside matrix products and attention, kernel by kernel.

Every operation reads its inputs and writes its outputs once; bytes are reads + writes of a token, in elements of the
computing dtype, `b` bytes, or of float32, 4 bytes. Arrays of T rows are counted, and of the rest what is launched. A
test holds the list against every kernel and torch operation that autograd runs on a model without memory. What FP8
training moves in place of this, or beside it, is in float8_traffic.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from benthic.config.model import ModelConfig
from benthic.plan.activations import element_bytes
from benthic.plan.float8_traffic import dense_fp8, experts_fp8, latent_fp8, plain_fp8
from benthic.plan.kernels import Kernels, Phase, both_ways
from benthic.plan.training import Training, TrainingPrecision

_PHASES: tuple[Phase, Phase] = ("forward", "backward")


def layer_traffic(config: ModelConfig, layer: int, precision: TrainingPrecision) -> list[Kernels]:
    """Everything memory-bound in one layer, bytes a token."""
    b, width = element_bytes(precision), config.hidden_size
    expert, fp8 = config.is_expert_layer(layer), precision == "fp8"
    found = [*_norms(config, b, fp8, expert), *_biases(config, b, fp8)]
    found += _latent(config, b, fp8) if config.kv_lora_rank else _plain(config, b)
    if fp8:
        found += latent_fp8(config) if config.kv_lora_rank else plain_fp8(config)
        found += experts_fp8(config) if expert else dense_fp8(config)
    else:
        found += _experts(config, b) if expert else _gated(config.intermediate_size, b)
    if expert:
        found += _routing(config, b)
    found += _input_gradients(config, expert, fp8, b)
    if layer >= config.num_hidden_layers:
        found += _prediction(width, b)
    return found


def embedding_traffic(config: ModelConfig, precision: TrainingPrecision) -> list[Kernels]:
    """Looking rows up, and adding their gradients after a sort, bytes a token."""
    row = element_bytes(precision) * config.hidden_size
    return [
        Kernels("embedding", "lookup", "forward", "gather", 2 * row),
        Kernels("embedding", "gradient", "backward", "scatter_add", 3 * row, launches=12),
    ]


def embedding_weight_traffic(precision: TrainingPrecision) -> list[Kernels]:
    """The embedding's gradient is cleared: bytes an element."""
    return [Kernels("embedding", "gradient cleared", "backward", "elementwise", float(element_bytes(precision)))]


def head_traffic(config: ModelConfig, precision: TrainingPrecision, blocks: int) -> list[Kernels]:
    """The final norm and one head's loss in `blocks` of rows, bytes a token: logits are read, and once more from the
    cache, and their gradient takes their place."""
    b = element_bytes(precision)
    return [
        Kernels("head", "loss and gradient of logits", "forward", "loss", 2 * b * config.vocab_size, 3 * blocks),
        Kernels("head", "gradients divided already", "backward", "elementwise", 0.0, 2),
        *both_ways("head", "final norm", "norm", 2 * b * config.hidden_size, 3 * b * config.hidden_size),
    ]


def head_weight_traffic(precision: TrainingPrecision, blocks: int, heads: int) -> list[Kernels]:
    """The gradient of all `heads`' shared matrix beside its products, bytes an element: of several blocks it is added
    up in float32 and cast, and joined with the other heads'."""
    b, found = element_bytes(precision), []
    if blocks > 1:
        added = 3 * 4.0 * (blocks - 1) * heads
        found.append(Kernels("head", "blocks added up", "forward", "elementwise", added, (blocks - 1) * heads))
        if b < 4:
            found.append(Kernels("head", "gradient in bfloat16", "forward", "narrow", (4.0 + b) * heads, heads))
    if heads > 1:
        found.append(Kernels("head", "heads added up", "backward", "elementwise", 3.0 * b * (heads - 1), heads - 1))
    return found


def update_traffic(training: Training) -> list[Kernels]:
    """The optimiser's step, bytes an element: AdamW reads gradient, master and moments and writes the latter two and
    the computing copy, in one pass that clips too."""
    b = element_bytes(training.precision)
    gradient = b if training.micro_batches == 1 else 4
    moments = 2 * 2 * (2 if training.bf16_moments else 4)
    published = 0 if b == 4 else b
    return [
        Kernels("update", "norm of the gradient", "forward", "reduction", gradient),
        Kernels("update", "AdamW", "forward", "optimizer", gradient + 2 * 4 + moments + published),
    ]


def accumulation_traffic(precision: TrainingPrecision, micro_batches: int) -> list[Kernels]:
    """Adding a micro-batch's weight gradients to those before, mean bytes an element: a step's first stay as they are
    until the second's come, which are added to them in float32."""
    later = (micro_batches - 1) / micro_batches
    if not later:
        return []
    if precision == "fp32":
        return [Kernels("update", "gradients added up", "backward", "elementwise", 3 * 4 * later)]
    return [
        Kernels("update", "first gradients in float32", "backward", "widen", (2 + 4) / micro_batches),
        Kernels("update", "gradients added up", "backward", "accumulate", (2 + 2 * 4) * later),
    ]


def _norms(config: ModelConfig, b: int, fp8: bool, expert: bool) -> Iterator[Kernels]:
    """Norms and residual sums. A norm reads x and writes y; backward reads x and a gradient and writes one."""
    row = b * config.hidden_size
    # In FP8 nobody keeps a norm's output but a router.
    dropped = "other" if fp8 else "norm"
    if config.norm_placement == "after":
        for block in ("attention", "feed_forward"):
            yield from both_ways(block, "norm", "norm", 2 * row, 3 * row)
            yield from both_ways(block, "residual sum", "elementwise", 3 * row, 3 * row)
        return
    yield from both_ways("attention", "norm", "norm", 2 * row, 3 * row, role=dropped)
    # The sum with the attention's result is a result too; backward takes both gradients.
    role = "norm" if expert else dropped
    yield from both_ways("feed_forward", "residual sum and norm", "norm", 4 * row, 4 * row, role=role)
    # Backward adds the gradients of the layer's input.
    yield from both_ways("feed_forward", "residual sum", "elementwise", 3 * row, 3 * row)


def _latent(config: ModelConfig, b: int, fp8: bool) -> Iterator[Kernels]:
    heads, latent, turned = config.num_attention_heads, config.kv_lora_rank or 0, config.qk_rope_head_dim
    key, own, value = config.query_head_dim, config.qk_nope_head_dim or 0, config.v_head_dim or 0
    role = "expanded" if fp8 else "norm"
    for width in filter(None, (config.q_lora_rank, latent)):
        yield from both_ways("attention", "norm of a latent", "norm", 2 * b * width, 3 * b * width, role=role)
    # Query, own and rotary key to query and key; backward gradients of query, key, value to those of projections.
    forward = b * (heads * (3 * key + own) + turned)
    backward = b * (heads * (3 * key + own + 2 * value) + turned)
    yield from both_ways("attention", "heads", "heads", forward, backward, role="expanded")
    # Gradients of the latent and of the rotary key are parts of one.
    yield Kernels("attention", "gradients joined", "backward", "elementwise", 2 * b * (latent + turned))


def _plain(config: ModelConfig, b: int) -> Iterator[Kernels]:
    for heads in (config.num_attention_heads, config.num_key_value_heads):
        width = b * heads * config.query_head_dim
        if config.qk_norm:
            yield from both_ways("attention", "norm of query or key", "norm", 2 * width, 3 * width)
        yield from both_ways("attention", "rotation", "heads", 2 * width, 2 * width, role="attention")


def _biases(config: ModelConfig, b: int, fp8: bool) -> Iterator[Kernels]:
    """Products add them, but for those in FP8; their gradients are sums over tokens."""
    widths: list[int] = []
    if config.qkv_bias and config.kv_lora_rank:
        widths = [config.kv_lora_rank + config.qk_rope_head_dim, *filter(None, [config.q_lora_rank])]
    elif config.qkv_bias:
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        widths = [one * config.query_head_dim for one in heads]
    if config.output_bias:
        widths.append(config.hidden_size)
    for width in widths:
        if fp8:
            yield Kernels("attention", "bias added", "forward", "elementwise", 2 * b * width)
        yield Kernels("attention", "gradient of a bias", "backward", "reduction", b * width)


def _input_gradients(config: ModelConfig, expert: bool, fp8: bool, b: int) -> Iterator[Kernels]:
    """Who reads one tensor gives it a gradient each, and they are added up."""
    added = 3 * b * config.hidden_size
    sums = 1 if config.kv_lora_rank else 2
    yield Kernels("attention", "gradients of the input added", "backward", "elementwise", sums * added, sums)
    # Gate and up read it apart but in FP8; router and routed experts do, and the shared expert.
    apart = 0 if fp8 else 1
    shared = bool(config.n_shared_experts)
    sums = 1 + (1 + apart) * shared if expert else apart
    if sums:
        yield Kernels("feed_forward", "gradients of the input added", "backward", "elementwise", sums * added, sums)


def _gated(inner: float, b: int, role: str = "gated") -> Iterator[Kernels]:
    # Backward: three read, two written.
    yield from both_ways("feed_forward", "SwiGLU", "gated", 3 * b * inner, 5 * b * inner, role=role)


def _experts(config: ModelConfig, b: int) -> Iterator[Kernels]:
    width, chosen = config.hidden_size, config.num_experts_per_tok
    rows, inner = b * (chosen + 1) * width, b * chosen * config.moe_intermediate_size
    # A token's row is read once and written for each choice, or the other way round. Backward takes the rows of the
    # gradient and, again, of the input.
    yield from both_ways("feed_forward", "rows to experts", "rows", rows, 2 * rows, routed=True)
    yield from both_ways("feed_forward", "rows summed", "rows", rows, rows, routed=True)
    # Backward: gradient, gate and up read; gradients of both written, and the activation again.
    yield from both_ways("feed_forward", "SwiGLU of rows", "gated", 3 * inner, 6 * inner, routed=True)
    if config.n_shared_experts:
        yield from _gated(config.n_shared_experts * config.moe_intermediate_size, b)
        yield Kernels("feed_forward", "sum with shared expert", "forward", "elementwise", 3 * b * width)


def _routing(config: ModelConfig, b: int) -> Iterator[Kernels]:
    """Scores and choice, one kernel each way; sorting, counting, and the order of weights: small and many."""
    experts, chosen = config.n_routed_experts or 0, config.num_experts_per_tok
    yield from both_ways("feed_forward", "choice", "elementwise", 8 * experts + 12 * chosen, 12 * experts + 12 * chosen)
    yield Kernels("feed_forward", "sorting rows by expert", "forward", "elementwise", 24 * chosen, 7)
    yield Kernels("feed_forward", "order of weights", "forward", "elementwise", 16 * chosen, 2)
    yield Kernels("feed_forward", "order of weights", "backward", "elementwise", 16 * chosen)
    if b < 4:
        # The logits' gradient in three bfloat16 parts, side by side.
        yield Kernels("feed_forward", "gradient in three parts", "backward", "elementwise", 50 * experts, 9)


def _prediction(width: float, b: int) -> Iterator[Kernels]:
    for name in ("norm of the embedding", "norm of the state", "last norm"):
        yield from both_ways("prediction", name, "norm", 2 * b * width, 3 * b * width)
    # What was cut off is copied; backward pads it and adds it to the main model's.
    yield Kernels("prediction", "positions cut off", "forward", "elementwise", 2 * 2 * b * width, 2)
    yield Kernels("prediction", "norms joined", "forward", "elementwise", 4 * b * width)
    yield Kernels("prediction", "gradients padded and added", "backward", "elementwise", 2 * (3 + 3) * b * width, 6)
