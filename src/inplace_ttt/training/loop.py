"""Run the training loop: steps, evaluations, checkpoints, and the conditions that end a run."""

import contextlib
import itertools
import math
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from inplace_ttt.config import Config, ttt_layers
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.data.build import DataSplits, StepSampleIndices, micro_batches, rank_sample_indices
from inplace_ttt.data.position import PositionRanges
from inplace_ttt.flops import forward_flops, peak_flops
from inplace_ttt.hf.calibration import HISTOGRAMS
from inplace_ttt.job import JobStopped, lost_rank
from inplace_ttt.megatron.checkpoint import Checkpointer, Progress, whole_checkpoints
from inplace_ttt.megatron.runtime import device, on_first_rank
from inplace_ttt.megatron.step import Pairs, Stepper, Totals, unwrap
from inplace_ttt.resilience.exits import PERMANENT_ERRNOS
from inplace_ttt.resilience.signals import StopRequest
from inplace_ttt.resilience.stragglers import AVERAGED_STEPS, MIN_STEPS, MatmulProbe, StragglerDetector, one_hot_table
from inplace_ttt.resilience.watchdog import Watchdog
from inplace_ttt.training import update_histograms
from inplace_ttt.training.health import first_nonfinite_layer, last_nonfinite_gradient
from inplace_ttt.training.records import MetricsFile, ProgressLog, WandB
from inplace_ttt.training.run_folder import RunFolder
from inplace_ttt.training.tensorboard import TensorBoard
from inplace_ttt.training.timeline import RestartCost, Timeline, read_timeline

FULL = 16 * 2**20  # free bytes below which a disk counts as full
EVAL_GROUP = 8  # micro batches between two checks for a stop request


class Recorder:
    """Write the outputs of a run on rank 0; on other ranks all calls do nothing. The constructor is collective."""

    def __init__(self, config: Config, resolved: dict, folder: RunFolder, first_step: int):
        self.outputs, hosts = [], [None] * dist.get_world_size()
        dist.all_gather_object(hosts, socket.gethostname())

        def open_outputs() -> None:
            self.detector, self.named = StragglerDetector(hosts, device().type), []
            self.timeline = Timeline(folder.path)
            self.timeline.start(folder.metrics, first_step, hosts)
            self.wandb = WandB(config, resolved, folder.path)
            self.metrics = MetricsFile(folder.metrics, first_step)
            self.tensorboard = TensorBoard(config, folder.path, first_step)
            self.screen = ProgressLog(config, first_step)
            self.outputs = [self.metrics, self.screen, self.wandb, self.tensorboard]

        on_first_rank(open_outputs)

    def write(self, record: dict) -> None:
        """Write a record of metrics.jsonl to all outputs."""
        if self.outputs:
            self.metrics.write(record)
            self.wandb.write(record)
            self.tensorboard.write(record)
            if not record.get("eval"):
                self.screen.step(record)

    def ranks(self, step: int, compute: list[float], data: list[float], seconds: float) -> None:
        """Record each rank's probe and data loading times (seconds). Report stragglers when their set changes.

        ``seconds``: duration of the step.
        """
        if not self.outputs:
            return
        self.detector.add(compute, data, seconds)
        if step % AVERAGED_STEPS and len(self.detector.steps) != MIN_STEPS:
            return
        slow = self.detector.slow()
        self.timeline.write(
            "ranks",
            step=step,
            spread=round(self.detector.spread(), 3),
            slow=[asdict(one) | {"says": str(one)} for one in slow],
        )
        lost = RestartCost.of(read_timeline(self.timeline.path.parent))
        slowest = {"ranks/slowest": slow[0].rank} if slow else {}
        self.wandb.write(
            {"step": step, "ranks/spread": self.detector.spread(), **slowest}
            | {"restarts/count": lost.restarts, "restarts/seconds_lost": lost.seconds}
        )
        if [one.rank for one in slow] != self.named:
            self.named = [one.rank for one in slow]
            self.say("\n".join(map(str, slow[:4])) or "no stragglers any more")

    def say(self, message: str) -> None:
        """Print a message."""
        if self.outputs:
            self.screen.say(message)

    def has_evaluated(self, step: int) -> bool:
        """Return, on all ranks, whether an evaluation after this step is already recorded (collective)."""
        found = [self.metrics.evaluated == step if self.outputs else None]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def keep(self) -> None:
        """Flush the records to disk before a checkpoint is published: no checkpoint may be newer than its records."""
        if self.outputs:
            self.metrics.flush()

    def histograms(self) -> dict[str, dict]:
        """Return the additional checkpoint files, by name, with the last histograms of update norms."""
        content = self.metrics.histograms.contents() if self.outputs else None
        return {} if content is None else {HISTOGRAMS: content}

    def end(self, why: str) -> None:
        """Record the end of the run and its reason in timeline.jsonl."""
        if self.outputs:
            self.timeline.end(why)

    def close(self) -> None:
        """Close all outputs."""
        for output in reversed(self.outputs):
            output.close()


class Trainer:
    """Run the steps, evaluations and checkpoints of a run."""

    def __init__(
        self,
        config: Config,
        sets: DataSplits,
        stepper: Stepper,
        optimizer,
        scheduler,
        checkpointer: Checkpointer,
        recorder: Recorder,
        folder: RunFolder,
        stop: StopRequest,
        watchdog: Watchdog,
        groups,
    ):
        self.config, self.sets, self.stepper, self.groups = config, sets, stepper, groups
        self.optimizer, self.scheduler, self.checkpointer = optimizer, scheduler, checkpointer
        self.recorder, self.folder, self.stop, self.watchdog = recorder, folder, stop, watchdog
        self.layers = ttt_layers(config.ttt, config.model.num_layers)
        self.device, self.empty = device(), False  # empty: a step without tokens that count was reported
        self.probe, self.reading = MatmulProbe(self.device), 0.0
        self.flops = config.train.global_batch_size * forward_flops(config).training  # FLOPs per step
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        self.peak = (peak_flops(name) or 0.0) * dist.get_world_size()  # FLOP/s of all ranks; 0: unknown

    def run(self, step: int) -> bool:
        """Train from step ``step`` + 1 to the last step. Return False if the run was stopped on request before that.

        Raises JobStopped if the run must end early (non-finite loss, full disk, too large updates).
        """
        train, checkpoint = self.config.train, self.config.checkpoint
        if self._evaluates(step) and not self.recorder.has_evaluated(step) and self._evaluate(step):
            return self._asked_to_stop(step)  # again at the step where the previous start ended
        per_rank = train.global_batch_size // self.groups.dp.size()
        micro = per_rank // train.micro_batch_size
        stream = self._training_stream(step)
        while step < train.steps:
            step += 1
            self.watchdog.set_phase(f"reading the data of step {step}")
            started = time.perf_counter()
            batches = list(itertools.islice(stream, micro))
            self.reading = time.perf_counter() - started
            stopped = self._step(step, batches)
            self.watchdog.set_phase(f"finishing a checkpoint after step {step}")
            self._writing(self.checkpointer.poll)
            last = step == train.steps
            if not stopped and self._evaluates(step):
                stopped = self._evaluate(step)
            if stopped:
                self._save(step, wait=True)
                return self._asked_to_stop(step)
            if last or (checkpoint.interval and step % checkpoint.interval == 0):
                self._save(step, wait=last)
        self._writing(self.checkpointer.close)
        self.recorder.end("done")
        return True

    def _evaluates(self, step: int) -> bool:
        train = self.config.train
        return step == train.steps or bool(step and train.eval_interval and step % train.eval_interval == 0)

    def _asked_to_stop(self, step: int) -> bool:
        self.recorder.say(f"stopped on request: checkpoint saved at step {step}; rerun the same command to resume")
        self.recorder.end(f"asked to stop after step {step}")
        return False

    def _training_stream(self, step: int) -> Iterator[MicroBatch]:
        train = self.config.train
        size, rank = self.groups.dp.size(), self.groups.dp.rank()
        numbers = StepSampleIndices(range(step, train.steps), train.global_batch_size, size, rank)
        return self._micro_batches(self.sets.train, numbers)

    def _micro_batches(self, samples, numbers: Sequence[int]) -> Iterator[MicroBatch]:
        return micro_batches(
            samples,
            numbers,
            micro_batch_size=self.config.train.micro_batch_size,
            num_workers=self.config.data.num_workers,
            cp_size=self.groups.cp.size(),
            cp_rank=self.groups.cp.rank(),
            chunk_size=self.config.ttt.chunk_size if self.layers else None,
            device=self.device,
        )

    def _step(self, step: int, batches: list[MicroBatch]) -> bool:
        """Run one optimizer step and write its record. Return True if any rank received a stop request."""
        started = time.perf_counter()
        modules, interval = unwrap(self.stepper.model).ttt_modules, self.config.ttt.histogram_interval
        counts_updates = bool(self.layers and interval and step % interval == 0)
        update_histograms.watch_updates(modules, counts_updates)
        totals = self.stepper.train(self._marked(batches, f"step {step}"), len(batches))
        self.watchdog.set_phase(f"the gradients of step {step}")
        if not math.isfinite(totals.loss):
            where = first_nonfinite_layer(
                unwrap(self.stepper.model), lambda: self.stepper.evaluate(iter(batches), len(batches))
            )
            self._give_up(f"loss is {totals.loss} at step {step}; first non-finite output: {where}")
        self.scheduler.step(increment=1)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.clip_grad_norm(self.config.optim.clip_grad))
        if not math.isfinite(norm):
            where = last_nonfinite_gradient(unwrap(self.stepper.model))
            self._give_up(f"gradient norm is {norm} at step {step}; first non-finite gradient: {where}")
        self.watchdog.set_phase(f"the all-reduce of measurements in step {step}")
        self.probe.run()
        stopped, ratios, detector = self._agree()
        self.watchdog.set_phase(f"the optimizer of step {step}")
        self.optimizer.step_with_ready_grads()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - started

        train = self.config.train
        tokens = train.global_batch_size * self.config.data.seq_length
        record = dict(
            step=step,
            loss=totals.mean_loss,
            grad_norm=norm,
            lr=self._learning_rate(),
            tokens=step * tokens,
            loss_tokens=int(totals.tokens),
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            peak_memory_gib=self._peak_memory(),
        )
        if self.peak:
            record["mfu"] = self.flops / seconds / self.peak
        record |= {f"grad_norm_{name}": float(value) for name, value in self.optimizer.grad_norms_by_group.items()}
        record |= {f"update_ratio/layer_{layer}": ratio for layer, ratio in zip(self.layers, ratios, strict=True)}
        if counts_updates:
            self.watchdog.set_phase(f"the histograms of step {step}")
            record["update_histogram"] = update_histograms.take_counts(modules, self.layers, self.groups)
            record |= update_histograms.quantiles(record["update_histogram"])
        self.recorder.write(record)
        if not totals.tokens and not self.empty:
            self.empty = True
            self.recorder.say(
                f"step {step}: no token of its samples counts in the loss, which is recorded as 0: a longer "
                f"data.seq_length or a larger train.global_batch_size reaches the answers"
            )
        self.recorder.ranks(step, *detector, seconds)
        limit = self.config.ttt.max_update_ratio
        over = [(ratio, layer) for ratio, layer in zip(ratios, self.layers, strict=True) if not ratio <= (limit or 0.0)]
        if limit is not None and over:
            ratio, layer = max(over)
            self._give_up(
                f"step {step}: the sum of updates in layer {layer} is {ratio:.2f} times the norm of W_down, above "
                f"ttt.max_update_ratio={limit}: resume with a lower optim.lr or ttt.lr_multiplier, or with ttt.clip, "
                f"or start a new run with a lower ttt.eta"
            )
        return stopped

    def _marked(self, batches: list[MicroBatch], of: str) -> Iterator[MicroBatch]:
        for number, batch in enumerate(batches, 1):
            self.watchdog.set_phase(f"micro batch {number} of {len(batches)} in {of}")
            yield batch

    def _learning_rate(self) -> float:
        """Return the learning rate of the pretrained parameters. Fast-weight parameters: times lr_multiplier."""
        return self.scheduler.get_lr({"max_lr": self.scheduler.max_lr, "min_lr": self.scheduler.min_lr})

    def _agree(self) -> tuple[bool, list[float], tuple[list[float], list[float]]]:
        """All-reduce the measurements of a step.

        Returns:
            Whether any rank received a stop request; for each TTT layer the largest |sum of updates| / |W_down| of the
            step; for each rank the seconds of its probe, and the seconds of its data loading.
        """
        report = torch.zeros(1 + len(self.layers), device=self.device)
        report[0] = self.stop.received is not None
        for layer, module in unwrap(self.stepper.model).ttt_modules.items():
            weight = module.linear_fc2.weight.detach().float().square().sum()
            if self.groups.tp.size() > 1:
                dist.all_reduce(weight, group=self.groups.tp)
            report[1 + self.layers.index(layer)] = (module.max_update_norm / weight).sqrt()
            module.max_update_norm = torch.zeros_like(module.max_update_norm)
        ranks = dist.get_world_size()
        mine = one_hot_table([self.probe.seconds(), self.reading], dist.get_rank(), ranks, self.device)
        report = torch.cat([report, mine])
        dist.all_reduce(report, op=dist.ReduceOp.MAX)
        stopped, *rest = report.tolist()
        ratios, rest = rest[: len(self.layers)], rest[len(self.layers) :]
        return bool(stopped), ratios, (rest[:ranks], rest[ranks:])

    def _evaluate(self, step: int) -> bool:
        """Compute and record the held-out loss, which does not depend on the number of ranks. Return True if any rank
        received a stop request meanwhile."""
        count, micro = self.config.train.eval_samples, self.config.train.micro_batch_size
        if self.sets.validation is None or not count:
            return False
        size, rank = self.groups.dp.size(), self.groups.dp.rank()
        share = math.ceil(count / (size * micro)) * micro
        self.watchdog.set_phase(f"reading the held-out data after step {step}")
        batches = list(
            self._micro_batches(_Padded(self.sets.validation, count), rank_sample_indices(0, share * size, size, rank))
        )
        edges = self.config.train.eval_positions
        ranges = PositionRanges(tuple(edges)) if edges else PositionRanges.equal(self.config.data.seq_length)
        totals = self._totals_of(step, batches, ranges)
        if totals is None:
            return True
        if not totals.tokens:
            self.recorder.say(f"step {step}: no held-out loss: none of the held-out tokens counts in the loss")
            return False
        record = dict(step=step, eval=True, loss=totals.mean_loss, accuracy=totals.accuracy)
        record["position"] = ranges.records(totals.by_position)
        if totals.by_source:
            record["sources"] = _by_name(self.sets.held_out, totals.by_source)
        said = f"step {step}: held-out loss {totals.mean_loss:.4f}, accuracy {totals.accuracy:.1%}"
        if self.layers and self.config.train.eval_without_fast_weights:
            plain = self._totals_of(step, batches, ranges, fast_weights=False)
            if plain is None:
                return True
            record["loss_without_fast_weights"] = plain.mean_loss
            pairs = list(zip(record["position"], ranges.records(plain.by_position), strict=True))
            if plain.by_source:
                pairs += zip(record["sources"], _by_name(self.sets.held_out, plain.by_source), strict=True)
            for one, without in pairs:
                one["loss_without_fast_weights"] = without["loss"]
            said += f"; {plain.mean_loss:.4f} without fast weights"
        said += "".join(f"; {one['name']} {one['loss']:.4f}" for one in record.get("sources", []))
        self.recorder.write(record)
        self.recorder.say(said)
        return False

    def _totals_of(self, step: int, batches: list[MicroBatch], ranges: PositionRanges, **options) -> Totals | None:
        """Return the totals of an evaluation, or None if any rank received a stop request meanwhile."""
        totals, names = Totals(), self.sets.held_out
        sources = len(names) if len(names) > 1 else 0
        for first in range(0, len(batches), EVAL_GROUP):
            group = batches[first : first + EVAL_GROUP]
            marked = self._marked(group, f"the evaluation after step {step}")
            totals += self.stepper.evaluate(marked, len(group), ranges, sources=sources, **options)
            if self._any_asked_to_stop():
                return None
        return totals

    def _any_asked_to_stop(self) -> bool:
        asked = torch.tensor([float(self.stop.received is not None)], device=self.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def _save(self, step: int, wait: bool) -> None:
        self.watchdog.set_phase(f"saving step {step}", timeout_factor=6)
        self.recorder.keep()
        samples = step * self.config.train.global_batch_size
        progress = Progress(step, samples, self.folder.packing, self.folder.identity)
        files = self.recorder.histograms()
        self._writing(lambda: self.checkpointer.save(progress, files=files, wait=wait))

    def _writing(self, action: Callable[[], None]) -> None:
        """Run an action that writes checkpoints. If it fails, end the run with one sentence on the cause."""
        try:
            action()
        except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
            if lost_rank(error):
                raise
            folder, cause = self.folder.checkpoints, _root_cause(error)
            free = shutil.disk_usage(folder).free
            # the error of a writer process may not mention a full disk, so check the disk itself
            lasting = free < FULL or any(os.strerror(number) in str(error) for number in PERMANENT_ERRNOS)
            self._give_up(
                f"a checkpoint could not be written to '{folder}' with {free / 1e6:,.0f} MB free ({cause})",
                code=3 if lasting else 4,
            )

    def _give_up(self, why: str, code: int = 3) -> None:
        """End the run on every rank, after the checkpoint that is still being written is finished."""
        with contextlib.suppress(Exception, CheckpointException):  # report `why`, not this error
            self.checkpointer.poll(blocking=True)
        whole, _ = whole_checkpoints(self.folder.checkpoints)
        saved = f"the last good checkpoint is '{whole[0]}'" if whole else "no checkpoint was written yet"
        raise JobStopped(f"{why}; {saved}", code)

    def _peak_memory(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _by_name(names: Sequence[str], sums: Pairs) -> list[dict]:
    """Return name, number of tokens and mean loss (nats per token) of each source with tokens."""
    found = zip(names, sums, strict=True)
    return [dict(name=name, tokens=int(tokens), loss=loss / tokens) for name, (loss, tokens) in found if tokens]


def _root_cause(error: BaseException) -> str:
    """Return the line of an error message with the cause, without the traces that writer processes and ranks add."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line and not line.startswith("Traceback")]
    return (telling or lines or [type(error).__name__])[-1][:300]


class _Padded:
    """Pad ``count`` samples with copies that do not count in the loss, so that all ranks have equally many."""

    def __init__(self, samples, count: int):
        self.samples, self.count = samples, count

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[min(index, self.count - 1)]
        if index >= self.count:
            sample.loss_mask = torch.zeros_like(sample.loss_mask)
        return sample
