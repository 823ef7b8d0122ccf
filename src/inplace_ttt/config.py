"""Every key of a run, its type and its default; Hydra fills these dataclasses from ``recipes/``.

Keys are Megatron's own names and the paper's. A field whose default is MISSING must come from a recipe.
What values fit together is checked in ``validation.py``.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

# Vocabularies are padded to a multiple of this at any tensor-parallel size, so that checkpoints fit every layout.
VOCAB_MULTIPLE = 128


def padded_vocab_size(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class UserError(Exception):
    """Something the user gave cannot work; the message is one sentence that says what would."""


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """All that an error says, as far as a line holds it."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_config_file(path: Path) -> dict:
    """The keys that a run was begun with, from its config.yaml. Raises UserError where it is damaged."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged ({first_line(error)}): restore it") from error
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is damaged (it holds no keys): restore it")
    return values


@dataclass
class RopeScaling:
    """RoPE scaling as in a Hugging Face config's ``rope_parameters``; keys that a type does not use stay null."""

    rope_type: str = "default"  # default, linear, yarn, llama3
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None  # yarn
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3


@dataclass
class Model:
    num_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int = MISSING  # key-value heads
    kv_channels: int = MISSING  # size of a head
    vocab_size: int | None = None  # null: the tokenizer's
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 1_000_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    max_position_embeddings: int | None = None  # null: data.seq_length
    tie_word_embeddings: bool = True
    sliding_window: int | None = None  # tokens a query attends to, itself included; null: all before it
    init_method_std: float = 0.02
    embedding_init_method_std: float | None = None  # null: init_method_std
    transformer_impl: str = "auto"  # auto, local, transformer_engine


@dataclass
class TTT:
    enabled: bool = True
    layers: Any = "every 6th"  # "every Nth" from layer 0 on, "all", or a list of layer numbers from 0
    chunk_size: int = 1024  # tokens
    eta: float = 1.0
    target: str = "hidden_states"  # hidden_states, input_embed
    conv_kernel: int = 5
    project: bool = True
    proj_init_std: float = 0.02
    prefix: str = "ring"  # how chunk states pass between context-parallel ranks: ring, ring_messages (no mapped memory)
    comm_dtype: str = "fp32"  # of the chunk states between context-parallel ranks: fp32, bf16
    keep_chunk_weights: bool | None = None  # for the backward, rather than make them twice; null: where memory is free
    lr_multiplier: float = 1.0  # learning rate of the new parameters over optim.lr
    clip_separately: bool = False  # clip the new parameters' gradients by their own norm
    max_update_ratio: float | None = 1.0  # stop when |sum of updates| / |W_down| exceeds it; null: never


@dataclass
class Parallel:
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    timeout_minutes: float = 10.0  # a collective that takes longer ends the job


@dataclass
class Source:
    path: str = MISSING  # prefix of a .bin and .idx pair
    weight: float = 1.0


@dataclass
class Data:
    kind: str = "indexed"  # indexed: files made by prepare_data.py; recall: synthetic key-value recall
    sources: list[Source] = field(default_factory=list)
    tokenizer: str | None = None  # folder or Hugging Face name; null: the one the first source was made with
    seq_length: int = MISSING
    reset_at_documents: bool = True  # attention, positions and fast weights start anew with each document
    validation_fraction: float = 0.02  # of the documents, held out
    num_workers: int = 0  # processes that read ahead
    recall_pairs: int = 16  # recall: key-value pairs in a sequence
    recall_alphabet: int = 100  # recall: different keys, and different values


@dataclass
class Optim:
    lr: float = MISSING
    min_lr_ratio: float = 0.1  # of lr, at the end of the decay
    warmup_fraction: float = 0.02  # of train.steps
    decay_fraction: float = 1.0  # of train.steps after which min_lr is reached
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class Train:
    steps: int = MISSING
    global_batch_size: int = MISSING  # sequences of data.seq_length tokens
    micro_batch_size: int = 1
    seed: int = 1234
    precision: str = "auto"  # auto: bf16 with CUDA, fp32 without
    recompute: str = "none"  # none, selective, full
    recompute_core_attn: bool = True  # of full; false: queries, keys, values and output are kept instead
    recompute_modules: list[str] = field(
        default_factory=lambda: ["core_attn"]
    )  # of selective: core_attn, mlp, layernorm
    eval_interval: int = 0  # steps; 0: only at the end
    eval_samples: int = 8  # 0: no evaluation


@dataclass
class Checkpoint:
    interval: int = 100  # steps; 0: only at the end and when told to stop
    keep: int = 2
    async_save: bool = True
    load: str | None = None  # a checkpoint to start a new run's weights from (resuming needs no key)


@dataclass
class Log:
    wandb: str = "auto"  # online, offline, disabled; auto: online where a key is there, else offline
    wandb_project: str = "inplace-ttt"
    interval: int = 1  # steps between progress lines where there is no terminal


@dataclass
class Run:
    name: str = MISSING
    dir: str = "runs/${run.name}"


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


def ttt_layers(ttt: TTT, num_layers: int) -> list[int]:
    """The layers (from 0) whose MLP has fast weights. Raises UserError for anything that is not a choice of layers."""
    if not ttt.enabled:
        return []
    chosen = ttt.layers
    if chosen == "all":
        return list(range(num_layers))
    if isinstance(chosen, str):
        words = chosen.split()
        number = words[1].rstrip("stndrh") if len(words) == 2 and words[0] == "every" else ""
        if not number.isdigit() or int(number) < 1:
            raise UserError(
                f"ttt.layers='{chosen}' is not understood: use 'every 6th', 'all' or a list such as [0,6,12]"
            )
        return list(range(0, num_layers, int(number)))
    if isinstance(chosen, int):
        chosen = [chosen]
    layers = list(chosen) if chosen is not None else []
    if not layers:
        raise UserError("ttt.layers is empty: name at least one layer, or set ttt.enabled=false")
    for layer in layers:
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
            raise UserError(
                f"ttt.layers names layer {layer}, but model.num_layers={num_layers}: "
                f"use numbers from 0 to {num_layers - 1}"
            )
    return sorted(set(layers))
