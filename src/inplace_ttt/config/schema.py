"""Every key of a run: its type, its range, its default, its meaning, and what another value means on resume.

Hydra fills these dataclasses from ``recipes/``. Keys are Megatron's own names and the paper's. A field whose default is
MISSING must come from a recipe. A range is written in the field's type and checked by ``ranges.py``; what values fit
together is checked in ``validation.py``.
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

# Vocabularies are padded to a multiple of this at any tensor-parallel size, so that checkpoints fit every layout.
VOCAB_MULTIPLE = 128
TARGETS = ("hidden_states", "input_embed")
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


class OnResume(enum.Enum):
    """Say what it means to resume a run with another value of a key."""

    REFUSED = "it would be another run"
    TAKES_EFFECT = "it takes effect from the step after the checkpoint on, and is announced"
    LAYOUT = "how the run is carried out, not what it computes"


IDENTITY, LAYOUT = OnResume.REFUSED, OnResume.LAYOUT

Count = Annotated[int, Ge(0), Le(10**9)]
Size = Annotated[int, Ge(1), Le(10**9)]
Width = Annotated[int, Ge(1), Le(2**20)]  # of a layer
Ranks = Annotated[int, Ge(1), Le(2**20)]
# Bounds keep out what fp32 does not hold, and so what would only show as NaN in the first step
Real = Annotated[float, Ge(-1e6), Le(1e6), AllowInfNan(False)]
Positive = Annotated[float, Ge(1e-30), Le(1e9), AllowInfNan(False)]
NotNegative = Annotated[float, Ge(0), Le(1e6), AllowInfNan(False)]
Deviation = Annotated[float, Ge(1e-30), Le(1e3), AllowInfNan(False)]  # of random weights
Fraction = Annotated[float, Ge(0), Le(1), AllowInfNan(False)]


@dataclass
class RopeScaling:
    """RoPE scaling as in a Hugging Face config's ``rope_parameters``; keys that a type does not use stay null."""

    rope_type: Annotated[str, OneOf(*ROPE_TYPES)] = "default"
    factor: Annotated[float, Ge(1), AllowInfNan(False)] | None = None
    original_max_position_embeddings: Size | None = None
    attention_factor: Positive | None = None  # yarn
    beta_fast: Positive | None = None  # yarn
    beta_slow: Positive | None = None  # yarn
    low_freq_factor: Positive | None = None  # llama3
    high_freq_factor: Positive | None = None  # llama3


@dataclass
class Model:
    family: Annotated[str, IDENTITY] = "qwen3"  # qwen3, qwen2 (also Qwen2.5) or llama: what is particular, models/
    num_layers: Annotated[int, Ge(1), Le(10_000), IDENTITY] = MISSING  # transformer layers
    hidden_size: Annotated[Width, IDENTITY] = MISSING  # d
    ffn_hidden_size: Annotated[Width, IDENTITY] = MISSING  # f, the inner size of the gated MLP
    num_attention_heads: Annotated[Width, IDENTITY] = MISSING  # query heads
    num_query_groups: Annotated[Width, IDENTITY] = MISSING  # key-value heads
    kv_channels: Annotated[int, Ge(2), Le(2**16), IDENTITY] = MISSING  # size of a head
    vocab_size: Annotated[int, Ge(1), Le(2**27), IDENTITY] | None = None  # null: the tokenizer's
    layernorm_epsilon: Annotated[Positive, Lt(1), IDENTITY] = 1e-6  # of all RMSNorms
    rotary_base: Annotated[float, Gt(1), AllowInfNan(False), IDENTITY] = 1_000_000.0  # theta of RoPE
    rope_scaling: Annotated[RopeScaling, IDENTITY] = field(default_factory=RopeScaling)
    max_position_embeddings: Annotated[Size, IDENTITY] | None = None  # null: data.seq_length
    tie_word_embeddings: Annotated[bool, IDENTITY] = True  # the output layer is the embedding
    # tokens a query attends to, itself included; null: all before it
    sliding_window: Annotated[Size, IDENTITY] | None = None
    # every Nth layer attends to all tokens, the others to the window; null: all of them to the window
    window_attn_skip_freq: Annotated[int, Ge(2), Le(10_000), IDENTITY] | None = None
    init_method_std: Annotated[Deviation, IDENTITY] = 0.02  # of new weights
    embedding_init_method_std: Annotated[Deviation, IDENTITY] | None = None  # null: init_method_std
    # auto: Transformer Engine where CUDA and the package are there, else plain torch
    transformer_impl: Annotated[str, OneOf("auto", "local", "transformer_engine"), LAYOUT] = "auto"


@dataclass
class TTT:
    enabled: Annotated[bool, IDENTITY] = True  # false: plain MLPs
    layers: Annotated[Any, IDENTITY] = "every 6th"  # "every Nth" from layer 0 on, "all", or a list of numbers from 0
    chunk_size: Annotated[Size, IDENTITY] = 1024  # tokens
    eta: Annotated[Real, IDENTITY] = 1.0  # learning rate of the updates
    # what targets are made of: the MLP's input or the embedding output
    target: Annotated[str, OneOf(*TARGETS), IDENTITY] = "hidden_states"
    conv_kernel: Annotated[int, Ge(1), Le(1023), Odd(), IDENTITY] = 5  # taps of the convolution that makes targets
    project: Annotated[bool, IDENTITY] = True  # the projection P behind the convolution
    proj_init_std: Deviation = 0.02  # of P's diagonal, when it is new
    # how chunk states pass between context-parallel ranks; ring_messages: without mapped memory
    prefix: Annotated[str, OneOf("ring", "ring_messages"), LAYOUT] = "ring"
    comm_dtype: Annotated[str, OneOf("fp32", "bf16")] = "fp32"  # of the chunk states between context-parallel ranks
    # keep chunk weights for the backward rather than recompute them; null: where memory is free
    keep_chunk_weights: Annotated[bool, LAYOUT] | None = None
    lr_multiplier: NotNegative = 1.0  # learning rate of the new parameters over optim.lr
    clip_separately: bool = False  # clip the new parameters' gradients by their own norm
    # largest norm of one chunk's update over that of W_down, here, in evaluation and in the export; null: no clipping
    clip: Positive | None = None
    # at steps divisible by it, a histogram of the norms of chunks' updates before clipping (update_histogram); 0: never
    histogram_interval: Count = 10
    max_update_ratio: Positive | None = 1.0  # stop when |sum of updates| / |W_down| exceeds it; null: never


@dataclass
class Parallel:
    tensor_model_parallel_size: Annotated[Ranks, LAYOUT] = 1  # ranks that split each layer
    pipeline_model_parallel_size: Annotated[Ranks, LAYOUT] = 1  # stages of layers
    context_parallel_size: Annotated[Ranks, LAYOUT] = 1  # ranks that split each sequence
    sequence_parallel: Annotated[bool, LAYOUT] = False  # norms and dropout split over tensor-parallel ranks by tokens
    use_distributed_optimizer: Annotated[bool, IDENTITY] = True  # its states are saved in a form of their own
    overlap_grad_reduce: Annotated[bool, LAYOUT] = False  # reduce gradients while the backward runs
    overlap_param_gather: Annotated[bool, LAYOUT] = False  # gather parameters while the forward runs
    # a collective that takes longer ends the job
    timeout_minutes: Annotated[float, Ge(0.1), Le(7 * 24 * 60), AllowInfNan(False), LAYOUT] = 10.0


@dataclass
class Source:
    path: Annotated[str, Path(), LAYOUT] = MISSING  # prefix of a .bin and .idx pair, which are known by their content
    weight: Annotated[Positive, IDENTITY] = 1.0
    name: Annotated[str, Word(), LAYOUT] | None = None  # in records; null: the last part of path


@dataclass
class Data:
    # indexed: files made by prepare_data.py; recall: synthetic key-value recall
    kind: Annotated[str, OneOf("indexed", "recall"), IDENTITY] = "indexed"
    sources: Annotated[list[Source], IDENTITY] = field(default_factory=list)
    # folder or Hugging Face name; null: the one the first source was made with
    tokenizer: Annotated[str, Path(), LAYOUT] | None = None
    seq_length: Annotated[Size, IDENTITY] = MISSING
    # attention, positions and fast weights start anew with each document
    reset_at_documents: Annotated[bool, IDENTITY] = True
    validation_fraction: Annotated[float, Ge(0), Lt(1), AllowInfNan(False), IDENTITY] = 0.02  # of the documents
    # held-out data of one's own, like sources; empty: validation_fraction of each source, else nothing of them
    validation: Annotated[list[Source], IDENTITY] = field(default_factory=list)
    num_workers: Annotated[int, Ge(0), Le(1024), LAYOUT] = 0  # processes that read ahead
    recall_pairs: Annotated[Size, IDENTITY] = 16  # recall: key-value pairs in a sequence
    recall_alphabet: Annotated[int, Ge(1), Le(2**26), IDENTITY] = 100  # recall: different keys, and different values


@dataclass
class Optim:
    lr: NotNegative = MISSING  # largest learning rate, after the warm-up
    min_lr_ratio: Fraction = 0.1  # of lr, at the end of the decay
    warmup_fraction: Fraction = 0.02  # of train.steps
    warmup_steps: Count | None = None  # in its place
    warmup_tokens: Annotated[int, Ge(0), Le(10**15)] | None = None  # in its place
    decay_fraction: Fraction = 1.0  # of train.steps after which min_lr is reached
    weight_decay: NotNegative = 0.1  # of weight matrices
    adam_beta1: Annotated[float, Ge(0), Lt(1), AllowInfNan(False)] = 0.9
    adam_beta2: Annotated[float, Ge(0), Lt(1), AllowInfNan(False)] = 0.95
    adam_eps: Positive = 1e-8
    clip_grad: NotNegative = 1.0  # largest norm of all gradients; 0: no clipping


@dataclass
class Train:
    steps: Size = MISSING  # of the optimizer, in the whole run
    global_batch_size: Annotated[int, Ge(1), Le(10**7), IDENTITY] = MISSING  # sequences of data.seq_length tokens
    micro_batch_size: Annotated[int, Ge(1), Le(10**7), LAYOUT] = 1  # sequences of one forward on a data-parallel rank
    seed: Annotated[int, Ge(0), Le(2**31 - 1), IDENTITY] = 1234  # of initial weights and of the order of samples
    precision: Annotated[str, OneOf("auto", "bf16", "fp32")] = "auto"  # auto: bf16 with CUDA, fp32 without
    recompute: Annotated[str, OneOf("none", "selective", "full"), LAYOUT] = "none"  # activations in the backward
    # of full; false: queries, keys, values and output are kept instead
    recompute_core_attn: Annotated[bool, LAYOUT] = True
    # of selective
    recompute_modules: Annotated[list[Annotated[str, OneOf("core_attn", "mlp", "layernorm")]], LAYOUT] = field(
        default_factory=lambda: ["core_attn"]
    )
    eval_interval: Count = 0  # steps; 0: only at the end
    eval_samples: Annotated[int, Ge(0), Le(10**7)] = 8  # 0: no evaluation
    # edges of the ranges of positions in the document for which the held-out loss is noted; null: eight equal ranges
    eval_positions: list[Count] | None = None
    eval_without_fast_weights: bool = True  # evaluate a second time with fast weights switched off


@dataclass
class Checkpoint:
    interval: Annotated[Count, LAYOUT] = 100  # steps; 0: only at the end and when told to stop
    keep: Annotated[Size, LAYOUT] = 2
    async_save: Annotated[bool, LAYOUT] = True
    # a checkpoint to start a new run's weights from (resuming needs no key)
    load: Annotated[str, Path(), LAYOUT] | None = None


@dataclass
class Log:
    # auto: online where a key is there, else offline
    wandb: Annotated[str, OneOf("auto", "online", "offline", "disabled"), LAYOUT] = "auto"
    wandb_project: Annotated[str, Word(), LAYOUT] = "inplace-ttt"
    tensorboard: Annotated[bool, LAYOUT] = False  # the same numbers, in the run's folder tensorboard/
    interval: Annotated[Size, LAYOUT] = 1  # steps between progress lines where there is no terminal


@dataclass
class Run:
    name: Annotated[str, Word(), LAYOUT] = MISSING
    dir: Annotated[str, Path(), LAYOUT] = "runs/${run.name}"


@dataclass
class Config:
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
    type: type  # without None and annotations; of a list, list
    optional: bool  # may be null
    on_resume: OnResume


def schema_keys(cls: type = Config, prefix: str = "", on_resume: OnResume = OnResume.TAKES_EFFECT) -> dict[str, Key]:
    """Return every key of a section by its full name; sections and the keys of list elements included."""
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
    """Return (type, whether it may be None, its OnResume) of an annotation."""
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


# keys whose value is a list of sources
SOURCE_LISTS = tuple(name.removesuffix(".path") for name in schema_keys() if name.endswith(".path"))


def padded_vocab_size(vocab_size: int) -> int:
    """Return the rows of the embedding: ``vocab_size`` rounded up to VOCAB_MULTIPLE."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def warmup_steps(config: Config) -> int:
    """Return the steps of the learning rate's warm-up, whichever key says them."""
    optim, train = config.optim, config.train
    if optim.warmup_steps is not None:
        return optim.warmup_steps
    if optim.warmup_tokens is not None:
        return math.ceil(optim.warmup_tokens / (train.global_batch_size * config.data.seq_length))
    return round(optim.warmup_fraction * train.steps)


def ttt_layers(ttt: TTT, num_layers: int) -> list[int]:
    """Return the numbers (from 0) of the layers whose MLP has fast weights.

    Raises UserError where ``ttt.layers`` is not a choice of layers.
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
                f"use numbers from 0 to {num_layers - 1}"
            )
    return sorted(set(chosen))


def _not_layers(chosen) -> UserError:
    return UserError(f"ttt.layers={chosen!r} is not understood: use 'every 6th', 'all' or a list such as [0,6,12]")
