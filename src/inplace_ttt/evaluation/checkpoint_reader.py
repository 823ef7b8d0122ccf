"""Measure the losses of a training checkpoint with the Megatron model, on all ranks of a parallel layout."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from inplace_ttt.config import Config, UserError, ttt_layers, with_recompute
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.data.position import PositionRanges
from inplace_ttt.evaluation.documents import Document
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.work_queue import counted
from inplace_ttt.hf.convert import inspect_checkpoint, reading_keys
from inplace_ttt.job import SLOW_PHASE_FACTOR, Job
from inplace_ttt.megatron import runtime
from inplace_ttt.validation import check_hardware, precision, transformer_impl, validate


def evaluation_config(path: Path, overrides: dict, world_size: int) -> Config:
    """Return a checkpoint's configuration for an evaluation on ``world_size`` ranks.

    The parallel layout is that of ``overrides`` (key: value). Without overrides it is the layout of the run if that
    fits the number of ranks; otherwise each rank has the whole model. Raises UserError if the configuration is invalid.
    """
    config = copy.deepcopy(inspect_checkpoint(path).config)
    config.train = with_recompute(config.train, "none")
    parallel, data, train = config.parallel, config.data, config.train
    if config.model.vocab_size is None:
        raise UserError(f"'{path}' has no model.vocab_size: add it to config.yaml of its run")
    if config.model.max_position_embeddings is None:
        config.model.max_position_embeddings = data.seq_length  # RoPE was set up for this length
    sizes = [f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context")]
    ranks = 1
    for size in sizes:
        ranks *= getattr(parallel, size)
    if not any(key.startswith("parallel.") for key in overrides) and world_size % ranks:
        for size in sizes:
            setattr(parallel, size, 1)
        parallel.sequence_parallel = False
    for key, value in overrides.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    parallel.overlap_grad_reduce = parallel.overlap_param_gather = False
    train.micro_batch_size = 1
    train.fp8 = None  # an evaluation reads texts of any length, in the precision of the weights
    train.offload_layers = 0
    config.optim.main_grads_dtype = config.optim.moments_dtype = "fp32"
    train.global_batch_size = max(1, world_size)  # only for validate(): an evaluation has no steps
    data.reset_at_documents = True
    data.seq_length = padded_length(config, max(config.ttt.chunk_size, 2))
    validate(config, world_size)
    check_hardware(config)
    return config


def padded_length(config: Config, length: int) -> int:
    """Return the smallest length of at least ``length`` tokens that the layout can split into slices."""
    cp = config.parallel.context_parallel_size
    unit = 1 if cp == 1 else 2 * cp * (config.ttt.chunk_size if config.ttt.enabled else 1)
    if config.parallel.sequence_parallel:
        unit *= config.parallel.tensor_model_parallel_size
    return -(-length // unit) * unit


@dataclass(frozen=True)
class ScoredDocument:
    """Hold a document and the ranges of positions whose losses are summed."""

    document: Document
    ranges: PositionRanges


class CheckpointReader:
    """Hold a checkpoint's model on this rank. All ranks must construct and call it together."""

    def __init__(self, path: Path, config: Config, job: Job, length: int):
        """Build the model and load its weights.

        Raises UserError, on all ranks, if the weights cannot be loaded.

        Args:
            config: from ``evaluation_config``; its data.seq_length is set to the padded ``length``.
            length: tokens of the longest text.
        """
        from inplace_ttt.megatron.checkpoint import Checkpointer
        from inplace_ttt.megatron.model import build_model
        from inplace_ttt.megatron.step import Stepper, unwrap

        self.config = config
        config.data.seq_length = padded_length(config, length)
        job.watchdog.set_phase(f"building the model of {path.name}", SLOW_PHASE_FACTOR)
        runtime.leave_groups()
        self.groups = runtime.start(config.parallel, config.train.seed, job.world, job.rendezvous)
        dtype, impl = precision(config), transformer_impl(config)
        self.model = build_model(config, dtype, impl, config.model.vocab_size, self.groups)
        checkpointer = Checkpointer(Path(), self.model, None, self.groups, keep=1, async_save=False)
        job.watchdog.set_phase(f"loading '{path}'", SLOW_PHASE_FACTOR)
        new, _ = checkpointer.load_weights(inspect_checkpoint(path).folder, f"'{path}'")
        runtime.raise_on_all_ranks(UserError(f"'{path}' lacks the tensor '{new[0]}'") if new else None)
        if job.world.rank == 0:
            sizes = " ".join(f"{kind} {getattr(self.groups, kind.lower()).size()}" for kind in ("TP", "PP", "CP", "DP"))
            print(
                f"'{path}' on {counted(job.world.size, 'rank')}: {sizes}, {str(dtype).removeprefix('torch.')}",
                flush=True,
            )
        self.model.eval()
        self.modules = unwrap(self.model).ttt_modules
        self.keys = reading_keys(inspect_checkpoint(path)) if self.modules else {}  # as in the exported model
        self.stepper = Stepper(config, self.model, self.model.config, self.groups)
        self.chunk_size = config.ttt.chunk_size if ttt_layers(config.ttt, config.model.num_layers) else None

    def _set_mode(self, mode: FastWeightMode) -> None:
        """Set clip and bound of the TTT layers for a mode."""
        layers = ttt_layers(self.config.ttt, self.config.model.num_layers)
        clip, trained = self.keys["ttt_clip"], (self.keys["ttt_trained_length"] or 0) // self.config.ttt.chunk_size
        clips = dict(zip(layers, clip if isinstance(clip, list) else [clip] * len(layers), strict=True))
        bound = mode.bound_of(self.keys["ttt_bound"]) if trained else None
        for layer, module in self.modules.items():
            module.clip = mode.clip_of(clips[layer])
            module.bound = None if bound is None else (bound, trained)

    @property
    def device(self) -> torch.device:
        """Return the device on which this rank's part of the model runs."""
        return self.stepper.device

    @property
    def at_once(self) -> int:
        """Return the number of documents per call of ``read``: one per data-parallel rank and pipeline stage."""
        return self.groups.dp.size() * self.groups.pp.size()

    def read(self, readings: Sequence[ScoredDocument], mode: FastWeightMode) -> list[list[list[float]]]:
        """Return [summed loss in nats, tokens] of each range of each document; the same on all ranks.

        Args:
            readings: at most ``at_once`` documents, the same on all ranks.
            mode: fast-weight mode.
        """
        length = padded_length(self.config, max(len(one.document.tokens) - 1 for one in readings))
        self.config.data.seq_length = length
        each = self.groups.pp.size()
        mine = [readings[number] if number < len(readings) else None
                for number in range(self.groups.dp.rank() * each, (self.groups.dp.rank() + 1) * each)]  # fmt: skip
        batches = [self._batch(one or readings[0], length) for one in mine]
        if self.modules:
            self._set_mode(mode)
        sums = self.stepper.range_losses(batches, [(one or readings[0]).ranges for one in mine], fast_weights=mode.on)
        found = [None] * self.groups.dp.size()
        if found[1:]:
            dist.all_gather_object(found, sums, group=self.groups.dp)
        else:
            found = [sums]
        return [one for part in found for one in part][: len(readings)]

    def _batch(self, reading: ScoredDocument, length: int) -> MicroBatch:
        """Return a micro batch of one document, with unscored padding after it to ``length`` tokens."""
        document = reading.document
        real = len(document.tokens) - 1
        tokens, labels = (torch.zeros(length, dtype=torch.long) for _ in range(2))
        mask = torch.zeros(length)
        whole = torch.from_numpy(document.tokens)
        tokens[:real], labels[:real] = whole[:-1], whole[1:]
        mask[:real] = 1.0 if document.counts is None else torch.from_numpy(document.counts).float()
        sample = Sample(tokens, labels, mask, (0, length))
        cp = self.groups.cp
        return MicroBatch.collate([sample], cp.size(), cp.rank(), self.chunk_size).to(runtime.device())

    def close(self) -> None:
        """Free the model."""
        self.stepper = self.model = self.modules = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
