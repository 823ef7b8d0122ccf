"""Measure a training step of a whole model, with and without fast weights, whole or by part."""

import gc
import statistics
import time
from dataclasses import replace

import torch

from inplace_ttt.benchmarks import step_profile
from inplace_ttt.config import Config, ttt_layers
from inplace_ttt.data.batch import MicroBatch, Sample
from inplace_ttt.estimate import GIB, GPUS, memory, step_seconds
from inplace_ttt.fit import describe_recompute
from inplace_ttt.flops import forward_flops, peak_flops
from inplace_ttt.megatron import runtime
from inplace_ttt.megatron.model import build_model
from inplace_ttt.megatron.optimizer import build_optimizer, wrap_data_parallel
from inplace_ttt.megatron.step import Stepper
from inplace_ttt.sizes import choose_recompute_here
from inplace_ttt.validation import precision, transformer_impl


class Step:
    """Run training steps of a model with random weights on random tokens."""

    def __init__(self, config: Config, groups):
        self.config = config
        model = build_model(config, precision(config), transformer_impl(config), config.model.vocab_size, groups)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.002 if "ttt" in name else config.model.init_method_std)
                else:
                    parameter.fill_(1.0)
        wrapped = wrap_data_parallel(model, model.config, config)
        self.optimizer, _ = build_optimizer(wrapped, model.config, config)
        self.optimizer.reload_model_params()
        self.stepper = Stepper(config, wrapped, model.config, groups)
        s, cp, device = config.data.seq_length, groups.cp, runtime.device()
        text = torch.randint(0, config.model.vocab_size, (s + 1,))
        sample = Sample(text[:-1], text[1:], torch.ones(s), None)
        chunk_size = config.ttt.chunk_size if ttt_layers(config.ttt, config.model.num_layers) else None
        count = config.train.global_batch_size // groups.dp.size()
        self.batches = [MicroBatch.collate([sample], cp.size(), cp.rank(), chunk_size).to(device) for _ in range(count)]

    def run(self) -> float:
        """Run one step, and return its seconds."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        totals = self.stepper.train(iter(self.batches), len(self.batches))
        with torch.profiler.record_function(step_profile.OPTIMIZER):
            self.optimizer.step()
            self.optimizer.zero_grad()
        torch.cuda.synchronize()
        assert totals.loss == totals.loss, "the loss of the benchmark is nan"
        return time.perf_counter() - started


def variants(config: Config, others: dict[str, Config]) -> dict[str, Config]:
    """Return the configuration with fast weights and without, and others, each with its choice of recompute.

    All ranks must call it.
    """
    asked = {"on": config, "off": replace(config, ttt=replace(config.ttt, enabled=False)), **others}
    return {name: choose_recompute_here(one) for name, one in asked.items()}


def measure_parts(config: Config, others: dict[str, Config], steps: int) -> tuple[list[dict], list[dict]]:
    """Measure a step by part, with fast weights, without, and of the configurations ``others`` (by name).

    Returns:
        A record of the milliseconds of each part and its floor, and one of each of the slowest kernels.
    """
    groups, records, kernels = runtime.start(config.parallel, config.train.seed), [], []
    flops, speed = step_profile.ceilings()
    for name, variant in variants(config, others).items():
        step = Step(variant, groups)
        step.run()
        step.run()
        seconds = statistics.median(step.run() for _ in range(steps))
        events = step_profile.trace(step.run)
        parts = step_profile.milliseconds_by_part(events, seconds)
        kernels += [dict(ttt=name, **record) for record in step_profile.slowest_kernels(events)]
        floors = step_profile.floors(variant, torch.distributed.get_world_size(), flops, speed)
        floors["the step"] = sum(floors.values())
        slowest_first = sorted(parts.items(), key=lambda one: -one[1])
        for part, milliseconds in [*slowest_first, ("the step", 1e3 * seconds)]:
            floor = floors.get(part)
            records.append(
                dict(
                    ttt=name,
                    recompute=describe_recompute(variant),
                    part=part,
                    ms=milliseconds,
                    share=milliseconds / seconds / 1e3,
                    floor_ms=floor,
                    ratio=milliseconds / floor if floor else None,
                )
            )
        del step, events
        gc.collect()
        torch.cuda.empty_cache()
    runtime.stop()
    return records, kernels


def measure(config: Config, others: dict[str, Config], rounds: int, steps: int) -> list[dict]:
    """Return one record with fast weights, one without, and one of each of the configurations ``others`` (by name).

    Models are built in turns: two do not fit in memory.
    """
    groups = runtime.start(config.parallel, config.train.seed)
    configs = variants(config, others)
    times, peaks = {name: [] for name in configs}, {}
    for _ in range(rounds):
        for name, variant in configs.items():
            step = Step(variant, groups)
            step.run()
            step.run()
            torch.cuda.reset_peak_memory_stats()
            times[name].append(statistics.median(step.run() for _ in range(steps)))
            peaks[name] = torch.cuda.max_memory_allocated() / GIB
            del step
            gc.collect()
            torch.cuda.empty_cache()
    ranks = torch.distributed.get_world_size()
    peak = peak_flops(torch.cuda.get_device_name())
    gpu = next((one for name, one in GPUS.items() if name in torch.cuda.get_device_name()), None)
    records = []
    for name, variant in configs.items():
        seconds = statistics.median(times[name])
        flops = forward_flops(variant).training * config.train.global_batch_size
        records.append(
            dict(
                ttt=name,
                layers=config.model.num_layers,
                recompute=describe_recompute(variant),
                seconds=seconds,
                tokens_per_second=config.train.global_batch_size * config.data.seq_length / seconds,
                tflops_per_gpu=flops / seconds / ranks / 1e12,
                mfu=flops / seconds / ranks / peak if peak else None,
                planned_seconds=step_seconds(variant, ranks, gpu) if gpu else None,
                peak_gib=peaks[name],
                planned_gib=memory(variant, ranks, gpu).allocated / GIB if gpu else None,
                ratio=statistics.median(a / b for a, b in zip(times[name], times["off"], strict=True)),
            )
        )
    runtime.stop()
    return records
