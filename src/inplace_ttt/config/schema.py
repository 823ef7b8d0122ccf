"""Define the keys of a run: type, range, default, meaning, and the effect of a changed value on resume.

Hydra fills these dataclasses from ``recipes/``. Keys have the names that Megatron and the paper use. A field whose
default is MISSING must be set by a recipe or on the command line. The field's type states its range, which
``ranges.py`` checks. ``validation.py`` checks combinations of values.
"""

import enum
import math
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import MISSING
from pydantic import AllowInfNan

from inplace_ttt.config.errors import UserError
from inplace_ttt.config.ranges import Odd, OneOf, Path, Word

# The vocabulary is padded to a multiple of this at every tensor-parallel size, so that a checkpoint can be loaded with
# another parallel layout
VOCAB_MULTIPLE = 128
TARGETS = ("hidden_states", "input_embed")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


class OnResume(enum.Enum):
    """Name the effect of a changed value of a key when a run resumes."""

    REFUSED = "refused: it would be another run"
    TAKES_EFFECT = "applied from the next step, and logged"
    LAYOUT = "applied without a notice: it changes how the run is executed, not what it computes"


IDENTITY, LAYOUT = OnResume.REFUSED, OnResume.LAYOUT

Count = Annotated[int, Ge(0), Le(10**9)]
Size = Annotated[int, Ge(1), Le(10**9)]
Width = Annotated[int, Ge(1), Le(2**20)]  # sizes of a layer
Ranks = Annotated[int, Ge(1), Le(2**20)]
# The bounds exclude numbers that fp32 cannot represent, which would only show as NaN in the first step
Real = Annotated[float, Ge(-1e6), Le(1e6), AllowInfNan(False)]
Positive = Annotated[float, Ge(1e-30), Le(1e9), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), Le(1e6), AllowInfNan(False)]
Deviation = Annotated[float, Ge(1e-30), Le(1e3), AllowInfNan(False)]  # standard deviation of initial weights
Fraction = Annotated[float, Ge(0), Le(1), AllowInfNan(False)]


@dataclass
class RopeScaling:
    """Describe the RoPE scaling, as ``rope_parameters`` in a Hugging Face config; unused keys are null."""

    rope_type: Annotated[str, OneOf(*ROPE_TYPES)] = "default"  # default, linear, yarn or llama3; default: no scaling
    factor: Annotated[float, Ge(1), AllowInfNan(False)] | None = None  # scaled context length / original context length
    # yarn and llama3: context length before scaling, in tokens
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None  # yarn: factor on cos and sin; null: derived from factor
    beta_fast: Positive | None = None  # yarn: rotations above which a dimension is not interpolated; null: 32
    beta_slow: Positive | None = None  # yarn: rotations below which a dimension is fully interpolated; null: 1
    # llama3: original context / wavelength below which a dimension is fully interpolated
    low_freq_factor: Positive | None = None
    # llama3: original context / wavelength above which a dimension is not interpolated
    high_freq_factor: Positive | None = None


@dataclass
class Model:
    """Configure the transformer."""

    family: Annotated[str, IDENTITY] = "qwen3"  # model family: qwen3, qwen2 (also Qwen2.5) or llama
    num_layers: Annotated[int, Ge(1), Le(10_000), IDENTITY] = MISSING  # number of transformer layers
    hidden_size: Annotated[Width, IDENTITY] = MISSING  # hidden size (d)
    ffn_hidden_size: Annotated[Width, IDENTITY] = MISSING  # inner size of the gated MLP (f)
    num_attention_heads: Annotated[Width, IDENTITY] = MISSING  # number of query heads
    num_query_groups: Annotated[Width, IDENTITY] = MISSING  # number of key-value heads
    kv_channels: Annotated[int, Ge(2), Le(2**16), IDENTITY] = MISSING  # size of an attention head
    # vocabulary size before padding; null: the tokenizer's
    vocab_size: Annotated[int, Ge(1), Le(2**27), IDENTITY] | None = None
    layernorm_epsilon: Annotated[Positive, Lt(1), IDENTITY] = 1e-6  # epsilon of all RMSNorms
    rotary_base: Annotated[float, Gt(1), AllowInfNan(False), IDENTITY] = 1_000_000.0  # base (theta) of RoPE
    # scaling of RoPE to longer contexts
    rope_scaling: Annotated[RopeScaling, IDENTITY] = field(default_factory=RopeScaling)
    # context length of RoPE and of exported models, in tokens; null: data.seq_length
    max_position_embeddings: Annotated[Size, IDENTITY] | None = None
    tie_word_embeddings: Annotated[bool, IDENTITY] = True  # true: the output layer shares the embedding weight
    # sliding attention window in tokens, the query's own included; null: full causal attention
    sliding_window: Annotated[Size, IDENTITY] | None = None
    # N: every Nth layer uses full attention instead of the sliding window; null: all layers use the window
    window_attn_skip_freq: Annotated[int, Ge(2), Le(10_000), IDENTITY] | None = None
    # softmax, or gated_delta_net: linear attention in all layers, a baseline (needs fla-core; without TP and CP)
    attention: Annotated[str, OneOf("softmax", "gated_delta_net"), IDENTITY] = "softmax"
    # heads of linear attention; null: model.num_attention_heads
    linear_num_heads: Annotated[Width, IDENTITY] | None = None
    # size of a head's queries and keys in linear attention; null: model.kv_channels
    linear_key_head_dim: Annotated[Width, IDENTITY] | None = None
    # size of a head's values in linear attention; null: model.kv_channels
    linear_value_head_dim: Annotated[Width, IDENTITY] | None = None
    init_method_std: Annotated[Deviation, IDENTITY] = 0.02  # standard deviation of initial weights
    # standard deviation of initial embeddings; null: model.init_method_std
    embedding_init_method_std: Annotated[Deviation, IDENTITY] | None = None
    # layer implementation: local (torch) or transformer_engine; auto: transformer_engine if CUDA and it are available
    transformer_impl: Annotated[str, OneOf("auto", "local", "transformer_engine"), LAYOUT] = "auto"


@dataclass
class TTT:
    """Configure the fast weights (arXiv 2604.06169)."""

    enabled: Annotated[bool, IDENTITY] = True  # true: use fast weights; false: plain MLPs
    # layers with fast weights: "every Nth" starting at layer 0, "all", or a list of layer indices
    layers: Annotated[Any, IDENTITY] = "every 6th"
    chunk_size: Annotated[Size, IDENTITY] = 1024  # tokens per chunk
    eta: Annotated[Real, IDENTITY] = 1.0  # learning rate eta of the fast-weight updates
    # factor of the sum of updates before each new one; 1: none is forgotten, as in the paper
    decay: Annotated[Positive, Le(1), IDENTITY] = 1.0
    # input of the targets: hidden_states (the MLP's input) or input_embed (the embedding output)
    target: Annotated[str, OneOf(*TARGETS), IDENTITY] = "hidden_states"
    conv_kernel: Annotated[int, Ge(1), Le(1023), Odd(), IDENTITY] = 5  # taps of the target convolution
    # true: train the target convolution; false: it stays the identity, so that the target of a token is its own input
    convolution: Annotated[bool, IDENTITY] = True
    project: Annotated[bool, IDENTITY] = True  # true: apply the projection P after the target convolution
    # standard deviation of the initial diagonal of P; with convolution=false P starts at 0
    proj_init_std: Deviation = 0.02
    # transport of carries between context-parallel ranks: ring (symmetric memory if available) or ring_messages (P2P)
    prefix: Annotated[str, OneOf("ring", "ring_messages"), LAYOUT] = "ring"
    comm_dtype: Annotated[str, OneOf("fp32", "bf16")] = "fp32"  # dtype of carries between context-parallel ranks
    # true: keep chunk weights for the backward; false: recompute them; null: keep them if enough memory is free
    keep_chunk_weights: Annotated[bool, LAYOUT] | None = None
    lr_multiplier: NotNegative = 1.0  # learning rate of the target convolution and projection, divided by optim.lr
    # true: clip the gradients of the target convolution and projection by their own norm; false: by the global norm
    clip_separately: bool = False
    # largest norm of a chunk's update / norm of W_down, in training, evaluation and export; null: no clipping
    clip: Positive | None = None
    # steps between histograms of update norms before clipping (update_histogram in metrics.jsonl); 0: none
    histogram_interval: Count = 10
    max_update_ratio: Positive | None = 1.0  # |sum of updates| / |W_down| above which the run stops; null: none


@dataclass
class Parallel:
    """Configure the parallel layout."""

    tensor_model_parallel_size: Annotated[Ranks, LAYOUT] = 1  # ranks that share each layer (TP)
    pipeline_model_parallel_size: Annotated[Ranks, LAYOUT] = 1  # pipeline stages (PP)
    context_parallel_size: Annotated[Ranks, LAYOUT] = 1  # ranks that share each sequence (CP)
    sequence_parallel: Annotated[bool, LAYOUT] = False  # true: tensor-parallel ranks split the norms by tokens
    # true: shard the optimizer states over data- and context-parallel ranks; it changes their checkpoint format
    use_distributed_optimizer: Annotated[bool, IDENTITY] = True
    overlap_grad_reduce: Annotated[bool, LAYOUT] = False  # true: reduce gradients during the backward
    overlap_param_gather: Annotated[bool, LAYOUT] = False  # true: gather parameters during the forward
    # timeout of collectives in minutes; a collective that takes longer ends the job
    timeout_minutes: Annotated[float, Ge(0.1), Le(7 * 24 * 60), AllowInfNan(False), LAYOUT] = 10.0


@dataclass
class Source:
    """Describe one indexed data set."""

    # path of a .bin and .idx pair without the suffix; on resume it may change if the content is the same
    path: Annotated[str, Path(), LAYOUT] = MISSING
    weight: Annotated[Positive, IDENTITY] = 1.0  # relative weight in the mixture
    name: Annotated[str, Word(), LAYOUT] | None = None  # name in metrics; null: the last part of path


@dataclass
class Data:
    """Configure the training and held-out data."""

    # kind of data: indexed (files written by prepare_data.py) or recall (synthetic key-value recall)
    kind: Annotated[str, OneOf("indexed", "recall"), IDENTITY] = "indexed"
    sources: Annotated[list[Source], IDENTITY] = field(default_factory=list)  # training data
    # tokenizer folder or Hugging Face name; null: the tokenizer of the first source
    tokenizer: Annotated[str, Path(), LAYOUT] | None = None
    seq_length: Annotated[Size, IDENTITY] = MISSING  # tokens per sample (s)
    # true: reset attention, positions and fast weights at each document start
    reset_at_documents: Annotated[bool, IDENTITY] = True
    # fraction of each source's documents that is held out; ignored if data.validation is set
    validation_fraction: Annotated[float, Ge(0), Lt(1), AllowInfNan(False), IDENTITY] = 0.02
    # separate held-out data, in the format of sources; empty: data.validation_fraction of each source is held out
    validation: Annotated[list[Source], IDENTITY] = field(default_factory=list)
    num_workers: Annotated[int, Ge(0), Le(1024), LAYOUT] = 0  # data loader processes per rank; 0: none
    recall_pairs: Annotated[Size, IDENTITY] = 16  # recall: key-value pairs per sample
    recall_alphabet: Annotated[int, Ge(1), Le(2**26), IDENTITY] = 100  # recall: number of keys, and of values


@dataclass
class Optim:
    """Configure AdamW and the learning rate schedule."""

    lr: NotNegative = MISSING  # peak learning rate, reached at the end of the warm-up
    min_lr_ratio: Fraction = 0.1  # learning rate at the end of the decay, divided by optim.lr
    warmup_fraction: Fraction = 0.02  # warm-up as a fraction of train.steps
    warmup_steps: Count | None = None  # warm-up in steps; overrides optim.warmup_fraction
    # warm-up in tokens; overrides optim.warmup_fraction
    warmup_tokens: Annotated[int, Ge(0), Le(10**15)] | None = None
    decay_fraction: Fraction = 1.0  # fraction of train.steps after which the decay ends
    weight_decay: NotNegative = 0.1  # decoupled weight decay of weight matrices
    adam_beta1: Annotated[float, Ge(0), Lt(1), AllowInfNan(False)] = 0.9  # beta1 of Adam
    adam_beta2: Annotated[float, Ge(0), Lt(1), AllowInfNan(False)] = 0.95  # beta2 of Adam
    adam_eps: Positive = 1e-8  # epsilon of Adam
    clip_grad: NotNegative = 1.0  # largest global gradient norm; 0: no clipping
    # dtype in which gradients are accumulated and reduced: fp32 or bf16
    main_grads_dtype: Annotated[str, OneOf("fp32", "bf16"), IDENTITY] = "fp32"
    moments_dtype: Annotated[str, OneOf("fp32", "bf16"), IDENTITY] = "fp32"  # dtype of Adam's two moments


@dataclass
class Train:
    """Configure the training loop and evaluation during training."""

    steps: Size = MISSING  # optimizer steps of the whole run
    global_batch_size: Annotated[int, Ge(1), Le(10**7), IDENTITY] = MISSING  # samples per optimizer step
    micro_batch_size: Annotated[int, Ge(1), Le(10**7), LAYOUT] = 1  # samples per micro batch on a data-parallel rank
    seed: Annotated[int, Ge(0), Le(2**31 - 1), IDENTITY] = 1234  # seed of initial weights and sample order
    precision: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"  # bf16 or fp32; auto: bf16 with CUDA, else fp32
    # FP8 format of linear layers (Transformer Engine): hybrid (forward e4m3, backward e5m2) or e4m3; null: bf16.
    # Fast weights, their targets, attention and logits stay in bf16 and fp32
    fp8: Annotated[str, OneOf("hybrid", "e4m3")] | None = None
    # scaling factors in FP8: tensorwise (of a tensor's current values) or blockwise (of 128 x 128, or 128 values)
    fp8_recipe: Annotated[str, OneOf("tensorwise", "blockwise")] = "tensorwise"
    # activation recomputation: none, selective (train.recompute_modules), full (whole layers), or auto: on a GPU the
    # cheapest that fits its memory by the estimate of launch/plan.py, on a CPU none
    recompute: Annotated[str, OneOf("auto", "none", "selective", "full"), LAYOUT] = "none"
    # for train.recompute=full: true: also recompute core attention; false: keep its inputs and output instead
    recompute_core_attn: Annotated[bool, LAYOUT] = True
    # for train.recompute=selective: what to recompute, of layernorm, mlp_act (the gated product), rope (queries, keys
    # and values after QK-norm and RoPE), mlp (linear_fc1 and what mlp_act names), qkv (linear_qkv and what rope names)
    # and core_attn
    recompute_modules: Annotated[
        list[Annotated[str, OneOf("layernorm", "mlp_act", "rope", "mlp", "qkv", "core_attn")]], LAYOUT
    ] = field(default_factory=lambda: ["core_attn"])
    # for train.recompute=selective: layers per pipeline stage in which mlp and qkv are recomputed; null: all
    recompute_num_layers: Annotated[Size, LAYOUT] | None = None
    # layers whose activations wait in the host's memory for the backward (Transformer Engine); needs
    # train.recompute=none
    offload_layers: Annotated[Count, LAYOUT] = 0
    eval_interval: Count = 0  # steps between evaluations; 0: only at the end
    eval_samples: Annotated[int, Ge(0), Le(10**7)] = 8  # held-out samples per evaluation; 0: no evaluation
    # edges of ranges of document positions, in tokens, for which held-out loss is recorded; null: eight equal ranges
    eval_positions: list[Count] | None = None
    eval_without_fast_weights: bool = True  # true: evaluate a second time without fast weights


@dataclass
class Checkpoint:
    """Configure checkpoints."""

    interval: Annotated[Count, LAYOUT] = 100  # steps between checkpoints; 0: only at the end and on a stop request
    keep: Annotated[Size, LAYOUT] = 2  # number of latest checkpoints to keep
    async_save: Annotated[bool, LAYOUT] = True  # true: write checkpoints in the background while training continues
    # checkpoint from which a new run takes its initial weights; a run resumes from its own checkpoints without this key
    load: Annotated[str, Path(), LAYOUT] | None = None


@dataclass
class Log:
    """Configure the outputs of a run."""

    # Weights & Biases: online, offline or disabled; auto: online if an API key is available, else offline
    wandb: Annotated[str, OneOf("auto", "online", "offline", "disabled"), LAYOUT] = "auto"
    wandb_project: Annotated[str, Word(), LAYOUT] = "inplace-ttt"  # Weights & Biases project
    tensorboard: Annotated[bool, LAYOUT] = False  # true: also write TensorBoard event files to RUN/tensorboard
    interval: Annotated[Size, LAYOUT] = 1  # steps between progress lines when the output is not a terminal


@dataclass
class Run:
    """Name a run and its folder."""

    name: Annotated[str, Word(), LAYOUT] = MISSING  # name of the run
    dir: Annotated[str, Path(), LAYOUT] = "runs/${run.name}"  # folder of the run's outputs


@dataclass
class Config:
    """Hold all sections of a run's configuration."""

    model: Model = field(default_factory=Model)
    ttt: TTT = field(default_factory=TTT)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)


@dataclass(frozen=True)
class Key:
    """Describe one key of the configuration."""

    name: str  # such as optim.lr
    type: type  # without None and annotations; list for a list
    optional: bool  # true: the value may be null
    on_resume: OnResume


def schema_keys(cls: type = Config, prefix: str = "", on_resume: OnResume = OnResume.TAKES_EFFECT) -> dict[str, Key]:
    """Return all keys of a section by full name, including sections and the keys of list elements."""
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for one in fields(cls):
        hint, name = hints[one.name], prefix + one.name
        kind, optional, role = _unwrap(hint)
        role = role or on_resume
        element = next(iter(typing.get_args(kind)), None) if typing.get_origin(kind) is list else None
        plain = typing.get_origin(kind) or kind
        found[name] = Key(name, plain, optional, role)
        section = plain if is_dataclass(plain) else element
        if isinstance(section, type) and is_dataclass(section):
            found |= schema_keys(section, f"{name}.", role)
    return found


def _unwrap(hint) -> tuple[type, bool, OnResume | None]:
    """Return (type, true if it may be None, its OnResume or None) of an annotation."""
    optional, role = False, None
    while True:
        if typing.get_origin(hint) is Annotated:
            hint, *extras = typing.get_args(hint)
            role = next((extra for extra in extras if isinstance(extra, OnResume)), role)
        elif type(None) in typing.get_args(hint):
            optional = True
            (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
        else:
            return hint, optional, role


# Names of the keys whose value is a list of sources
SOURCE_LISTS = tuple(name.removesuffix(".path") for name in schema_keys() if name.endswith(".path"))


def padded_vocab_size(vocab_size: int) -> int:
    """Return the number of embedding rows: ``vocab_size`` rounded up to a multiple of VOCAB_MULTIPLE."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def warmup_steps(config: Config) -> int:
    """Return the number of warm-up steps, from warmup_steps, warmup_tokens or warmup_fraction."""
    optim, train = config.optim, config.train
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    if optim.warmup_tokens is not None:
        return math.ceil(optim.warmup_tokens / (train.global_batch_size * config.data.seq_length))
    return round(optim.warmup_fraction * train.steps)


def ttt_layers(ttt: TTT, num_layers: int) -> list[int]:
    """Return the indices of the layers whose MLP has fast weights, in ascending order.

    Raises:
        UserError: ``ttt.layers`` is not a valid choice of layers.
    """
    if not ttt.enabled:
        return []
    chosen = ttt.layers
    if chosen == "all":
        return list(range(num_layers))
    if isinstance(chosen, str):
        words = chosen.split()
        number = words[1].rstrip("stndrh") if len(words) == 2 and words[0] == "every" else ""
        if not (number.isascii() and number.isdigit()) or len(number) > 6 or int(number) < 1:
            raise _not_layers(chosen)
        return list(range(0, num_layers, int(number)))
    if isinstance(chosen, int) and not isinstance(chosen, bool):
        chosen = [chosen]
    if chosen is not None and not isinstance(chosen, list | tuple):
        raise _not_layers(chosen)
    if not chosen:
        raise UserError("ttt.layers is empty: name at least one layer, or set ttt.enabled=false")
    for layer in chosen:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
            raise UserError(
                f"ttt.layers names layer {layer}, but model.num_layers={num_layers}: "
                f"use indices from 0 to {num_layers - 1}"
            )
    return sorted(set(chosen))


def _not_layers(chosen) -> UserError:
    return UserError(f"ttt.layers={chosen!r} is not valid: use 'every 6th', 'all' or layer indices such as [0,6,12]")
