"""Estimate the memory of a run's fullest GPU, and the FLOPs and time of a step.

Memory is counted tensor by tensor, as the training code allocates it. Time is FLOPs divided by the measured throughput
of matrix products and attention (figures.json). The estimate assumes Transformer Engine layers in bf16.
"""

import math
from dataclasses import dataclass

from inplace_ttt.config import Config, padded_vocab_size, recomputed_modules, ttt_layers
from inplace_ttt.figures import figures
from inplace_ttt.flops import forward_flops, peak_flops
from inplace_ttt.hf.parameters import layer_parameters
from inplace_ttt.models import has_qk_norm
from inplace_ttt.operation import EXCHANGE_WINDOW_BYTES, KEPT_SHARE, WINDOW_BYTES

GIB = 2**30
WEIGHT, MASTER = 2, 4  # bytes per parameter: weights in bf16, master weights in fp32
BYTES = {"fp32": 4, "bf16": 2}
FP8_WEIGHTS = 2  # of the linears: an FP8 copy and its transpose
# Memory outside torch's allocator: CUDA context, kernels, buffers of NCCL and cuBLAS
NON_TORCH_BYTES = 4.0 * GIB
# Fraction of torch's allocations that is reserved in addition, because of fragmentation
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Gpu:
    """Describe a GPU model."""

    name: str
    memory: float  # bytes available to a process

    @property
    def peak(self) -> float:
        """Return the dense bf16 peak in FLOP/s."""
        return peak_flops(self.name)


GPUS = {gpu.name: gpu for gpu in (Gpu("H100", 78.5 * GIB), Gpu("H200", 139.0 * GIB), Gpu("A100", 78.5 * GIB))}


@dataclass(frozen=True)
class RankShard:
    """Describe one GPU's share of the model and of a micro batch, on ``world`` GPUs."""

    config: Config
    world: int

    @property
    def tp(self) -> int:
        """Return the tensor-parallel size."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Return the pipeline-parallel size."""
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Return the context-parallel size."""
        return self.config.parallel.context_parallel_size

    @property
    def dp(self) -> int:
        """Return the data-parallel size: ``world`` divided by the other three sizes."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def optimizer_shards(self) -> int:
        """Return the number of ranks that share the optimizer states."""
        return self.dp * self.cp if self.config.parallel.use_distributed_optimizer else 1

    @property
    def tokens(self) -> int:
        """Return the tokens per rank of a micro batch."""
        return self.config.data.seq_length * self.config.train.micro_batch_size // self.cp

    @property
    def micro_batches(self) -> int:
        """Return the number of micro batches per step."""
        return self.config.train.global_batch_size // (self.dp * self.config.train.micro_batch_size)

    def layers(self, stage: int) -> range:
        """Return the layer indices of a pipeline stage."""
        count = self.config.model.num_layers // self.pp
        return range(stage * count, (stage + 1) * count)

    def fast_layers(self, stage: int) -> int:
        """Return the number of layers with fast weights in a pipeline stage."""
        chosen = ttt_layers(self.config.ttt, self.config.model.num_layers)
        return sum(layer in self.layers(stage) for layer in chosen)

    def parameters(self, stage: int) -> int:
        """Return the number of parameters on one GPU of a pipeline stage."""
        model, each = self.config.model, layer_parameters(self.config.model, self.config.ttt)
        ends = (stage == 0) + (stage == self.pp - 1)  # embedding and output
        if self.pp == 1 and model.tie_word_embeddings:
            ends = 1
        vocabulary = padded_vocab_size(model.vocab_size or 0)
        layers = len(self.layers(stage))
        return int(
            layers * (each.split / self.tp + each.whole)
            + self.fast_layers(stage) * each.fast
            + ends * vocabulary * model.hidden_size / self.tp
            + (stage == self.pp - 1) * model.hidden_size  # the last norm
        )

    def linear_parameters(self, stage: int) -> float:
        """Return the number of weights of the linear layers on one GPU of a pipeline stage, without fast weights."""
        model = self.config.model
        each = layer_parameters(model, self.config.ttt).split
        fast = self.fast_layers(stage) * model.hidden_size * model.ffn_hidden_size
        return (len(self.layers(stage)) * each - fast) / self.tp


@dataclass(frozen=True)
class Memory:
    """Hold the estimated bytes on one GPU, by part.

    Of the transient parts only the largest counts: the logits are freed before the backward of the layers begins.
    """

    persistent: dict[str, float]
    transient: dict[str, float]

    @property
    def allocated(self) -> float:
        """Return the peak bytes that torch reports (``peak_memory_gib`` of metrics.jsonl, there in GiB)."""
        return sum(self.persistent.values()) + max(self.transient.values())

    @property
    def needed(self) -> float:
        """Return the bytes that a GPU must have, with fragmentation and memory outside torch."""
        return self.allocated * (1 + FRAGMENTATION) + NON_TORCH_BYTES


def memory(config: Config, world: int, gpu: Gpu) -> Memory:
    """Return the memory of one GPU of the fullest pipeline stage, on ``world`` GPUs.

    train.recompute must not be ``auto``: see ``fit.choose_recompute``.
    """
    shard = RankShard(config, world)
    return max((_stage_memory(shard, stage, gpu) for stage in range(shard.pp)), key=lambda stage: stage.needed)


def _stage_memory(shard: RankShard, stage: int, gpu: Gpu) -> Memory:
    config, parameters = shard.config, shard.parameters(stage)
    in_flight = min(shard.pp - stage, shard.micro_batches)
    fast, sizes = shard.fast_layers(stage), _Activations(shard)
    persistent = {
        "weights": WEIGHT * parameters,
        "gradients": BYTES[config.optim.main_grads_dtype] * parameters,
        "optimizer": (MASTER + 2 * BYTES[config.optim.moments_dtype]) * parameters / shard.optimizer_shards,
        "ring carries": _carry_bytes(shard, fast, in_flight),
    }
    if config.train.fp8 is not None:
        persistent["FP8 weights"] = FP8_WEIGHTS * shard.linear_parameters(stage)
    free = gpu.memory - NON_TORCH_BYTES - sum(persistent.values())
    chosen = set(ttt_layers(config.ttt, config.model.num_layers))
    activations = in_flight * sum(
        sizes.kept(number, layer in chosen)
        for number, layer in enumerate(shard.layers(stage))
        if number >= config.train.offload_layers
    )
    at_work = sizes.at_work
    if fast:
        held = sizes.window
        if sizes.full:
            if sizes.keeps(1, free - activations - at_work):
                held = sizes.chunk_weights
        elif sizes.keeps(fast * shard.pp, free):  # free memory as seen by the first layer, before activations
            activations += sizes.chunk_weights * fast * in_flight
            held = 0.0  # the suffix sums reuse the chunk weights' memory
        at_work += sizes.fast_at_work(held)
    persistent["activations"] = activations
    logits = _logits(shard) if stage == shard.pp - 1 else 0.0
    return Memory(persistent, {"working memory of one layer": at_work, "logits": logits})


class _Activations:
    """Estimate the bytes of a micro batch in one layer on one GPU."""

    def __init__(self, shard: RankShard):
        config, t, tp = shard.config, shard.tokens, shard.tp
        model, train = config.model, config.train
        queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
        queries, keys = 2 * t * queries / tp, 2 * t * keys / tp
        hidden = 2 * model.hidden_size * t / (tp if config.parallel.sequence_parallel else 1)
        self.whole_hidden = 2 * model.hidden_size * t
        self.z = 2 * model.ffn_hidden_size * t / tp
        self.shard, self.full, self.recomputed = shard, train.recompute == "full", recomputed_modules(train)
        self.always = 2 * hidden + queries  # inputs of attention and of the MLP, output of attention
        log_sums = 4 * t * model.num_attention_heads / tp
        self.qkv = queries + 2 * keys  # output of linear_qkv, and the heads that attention keeps
        self.has_qk_norm, self.fp8 = has_qk_norm(model), train.fp8 is not None
        heads = self.qkv
        if shard.cp > 1:  # attention keeps keys and values of its own: received, or gathered from all ranks
            gathered = config.data.reset_at_documents or model.sliding_window is not None
            heads -= 2 * keys
            self.always += 2 * keys * (shard.cp if gathered else 1)
        # by the module of train.recompute_modules that recomputes them
        self.parts = {
            "layernorm": 2 * hidden,
            "rope": heads,
            "core_attn": log_sums,
            "mlp": 2 * self.z,  # gate and up
            "mlp_act": self.z,
        }
        self.hidden, self.queries = hidden, queries
        if self.fp8:  # the linears keep FP8 copies of their inputs instead
            self.parts |= {"layernorm": 0.0, "mlp_act": 0.0}
        products = 3 * self.z + 2 * hidden  # gradients of gate, up and their product, and of hidden states
        if self.full:
            self.always = hidden + (0 if train.recompute_core_attn else 2 * (queries + keys) + log_sums)
            self.at_work = 2 * hidden + queries + sum(self.parts.values()) + self.has_qk_norm * self.qkv + products
            self.at_work += self.fp8 * (hidden + queries / 2 + self.z)
        else:
            again = self.recomputed.of_layer(0)
            self.at_work = products + ("mlp" in again) * 2 * self.z + ("layernorm" in again) * hidden

    def kept(self, number: int, is_fast: bool) -> float:
        """Return the bytes that a layer keeps from its forward to its backward, without chunk weights.

        Args:
            number: index of the layer in its pipeline stage.
        """
        if self.full:
            return self.always
        again = self.recomputed.of_layer(number)
        parts = sum(size for name, size in self.parts.items() if name not in again)
        parts += self.qkv * ("qkv" not in again and (self.has_qk_norm or "rope" in again))
        if self.fp8:
            parts += self.hidden + self.queries / 2  # inputs of QKV and fc1; the output of attention, a second time
            # Fast weights are bf16, and so is what they and their targets read. So are inputs of linears that run again
            parts += self.z * ("mlp_act" not in again) if is_fast else self.z / 2
            in_bf16 = {"mlp", "qkv"} & again | ({"mlp"} if is_fast else set())
            parts += self.hidden * len(in_bf16) * ("layernorm" not in again)
        return self.always + parts + is_fast * self.whole_hidden  # targets

    @property
    def chunk_weights(self) -> float:
        """Return the bytes of the bf16 weights of all chunks of a micro batch, in one layer."""
        config = self.shard.config
        chunks = math.ceil(self.shard.tokens / config.ttt.chunk_size)
        return 2 * config.model.hidden_size * config.model.ffn_hidden_size / self.shard.tp * chunks

    def keeps(self, layers: int, free: float) -> bool:
        """Return True if chunk weights are kept for the backward.

        Those of ``layers`` layers are alive at once, and ``free`` bytes of device memory are free.
        """
        setting = self.shard.config.ttt.keep_chunk_weights
        return layers * self.chunk_weights <= KEPT_SHARE * free if setting is None else setting

    @property
    def window(self) -> float:
        """Return the bytes of chunk weights alive at once if they are not kept."""
        return min(self.chunk_weights, WINDOW_BYTES if self.shard.cp == 1 else EXCHANGE_WINDOW_BYTES)

    def fast_at_work(self, held: float) -> float:
        """Return the extra bytes of a TTT layer's recompute and backward, given ``held`` bytes of chunk weights."""
        config = self.shard.config
        state = 4 * config.model.hidden_size * config.model.ffn_hidden_size / self.shard.tp
        # Targets, their gradient, and one state. Chunk weights, and the product if it was recomputed, are freed before
        # gradients of gate and up are allocated.
        freed = 1 if "mlp_act" in self.recomputed.of_layer(0) else 2
        return max(0.0, 2 * self.whole_hidden + state + held - freed * self.z)


def _carry_bytes(shard: RankShard, fast: int, in_flight: int) -> float:
    """Return the bytes of carries: receive buffers, carries of one layer in flight, and carries saved for recompute."""
    config = shard.config
    if shard.cp == 1 or not fast:
        return 0.0
    numbers = config.model.hidden_size * config.model.ffn_hidden_size / shard.tp * config.train.micro_batch_size
    wire = {"fp32": 4, "bf16": 2}[config.ttt.comm_dtype]
    return numbers * (2 * wire + 4 * 4 + 2 * 4 * fast * in_flight)


def _logits(shard: RankShard) -> float:
    """Return the bytes of the logits of one block of tokens, of the output weight's gradient, and of hidden states."""
    model = shard.config.model
    vocabulary = padded_vocab_size(model.vocab_size or 0) / shard.tp
    weight = vocabulary * model.hidden_size
    # fp32 logits and their bf16 gradients; then these, and the product that is added to the gradient of the weight
    return max(6 * 2**28 + 4 * weight, 2 * 2**28 + 8 * weight) + 4 * 2 * model.hidden_size * shard.tokens


def step_seconds(config: Config, world: int, gpu: Gpu) -> float:
    """Return the expected seconds per step on ``world`` GPUs.

    The ``rates`` of figures.json are measured. ``products``, ``attention`` and ``attention_forward``: fraction of the
    GPU's peak. ``rest``: time of all other operations / time of products. ``fast_weights``: time of fast weights / time
    of their FLOPs at the rate of products.
    """
    shard, flops, rates = RankShard(config, world), forward_flops(config), figures()["rates"]
    products = 3 * (flops.layers + flops.logits) + rates["fast_weights"] * 3 * flops.fast
    products += recomputed_products(config)
    again = flops.attention * recomputes_attention(config)
    seconds = products / rates["products"] * (1 + rates["rest"])
    seconds += 3 * flops.attention / rates["attention"] + again / rates["attention_forward"]
    bubble = (shard.micro_batches + shard.pp - 1) / shard.micro_batches
    return config.train.global_batch_size * seconds / (gpu.peak * world) * bubble


def recomputes_attention(config: Config) -> bool:
    """Return True if the core attention of all layers runs again in the backward."""
    train = config.train
    whole_layers = train.recompute == "full" and train.recompute_core_attn
    return whole_layers or "core_attn" in recomputed_modules(train).modules


def recomputed_products(config: Config) -> float:
    """Return the FLOPs of the matrix products of one sequence that run again in the backward."""
    model, s, flops = config.model, config.data.seq_length, forward_flops(config)
    if config.train.recompute == "full":
        return flops.layers + flops.fast
    again, stages = recomputed_modules(config.train), config.parallel.pipeline_model_parallel_size
    each = {
        "mlp": 2 * s * model.hidden_size * 2 * model.ffn_hidden_size,
        "qkv": 2 * s * model.hidden_size * (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels,
    }
    stage = model.num_layers // stages
    return stages * sum(each[name] for number in range(stage) for name in each.keys() & again.of_layer(number))
