"""Attribute the GPU time of a training step to its parts, from a trace of torch.profiler.

A kernel belongs to the innermost scope around its launch that PARTS knows: a node of the graph, forward or backward, or
a range that the step marks.
"""

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from inplace_ttt.benchmarks.timing import milliseconds
from inplace_ttt.config import Config
from inplace_ttt.estimate import RankShard, recomputed_products, recomputes_attention
from inplace_ttt.flops import forward_flops
from inplace_ttt.megatron.recompute import RECOMPUTE

OPTIMIZER = "optimizer"  # a range
# Parts by the names of scopes. Others: norms, RoPE, SwiGLU, residuals, the embedding
PARTS = {
    RECOMPUTE: rf"^{RECOMPUTE}$",
    OPTIMIZER: rf"^{OPTIMIZER}$",
    "fast weights": r"^(FastWeightLinear|_ChunkTarget)(Backward)?$",
    "cross-entropy": r"^_LinearCrossEntropy(Backward)?$",
    "attention": r"Attn|scaled_dot_product|^_(Kept|Inputs)(Backward)?$",
    "linear layers": r"^(_Linear|LinearWithGradAccumulationAndAsyncCommunication)(Backward)?$",
}
OTHER, COMMUNICATION, IDLE = "norms, RoPE, SwiGLU, others", "communication", "GPU idle"
CHECKPOINT = "CheckpointFunctionBackward"  # of Megatron
PRODUCT = re.compile(r"gemm|nvjet|cutlass|xmma|splitk|cublas", re.IGNORECASE)  # kernels of matrix products
KERNEL_NAME = 70  # characters of a kernel's name that are shown
# Categories of events
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
SCOPES = ("cpu_op", "user_annotation")


def trace(run: Callable[[], None]) -> list[dict]:
    """Return the events of one call in Chrome's trace format."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def milliseconds_by_part(events: Iterable[dict], seconds: float) -> dict[str, float]:
    """Return the milliseconds of each part's kernels, and those in which the GPU had none.

    Args:
        events: of one step, in Chrome's trace format; ``ts`` and ``dur`` in microseconds.
        seconds: duration of the same step without a profiler, which slows the host down.
    """
    kernels = list(_kernels(events))
    found: dict[str, float] = defaultdict(float)
    for part, kernel in kernels:
        found[part] += kernel["dur"] / 1e3
    found[IDLE] = max(0.0, seconds * 1e3 - _busy([kernel for _, kernel in kernels]) / 1e3)
    return dict(found)


def slowest_kernels(events: Iterable[dict], number: int = 20) -> list[dict]:
    """Return a record of each of the kernels that take most time: its part, calls, milliseconds and name."""
    found: dict[tuple[str, str], dict] = {}
    for part, kernel in _kernels(events):
        name = kernel["name"].removeprefix("void ")
        record = found.setdefault((part, name), dict(part=part, calls=0, ms=0.0, kernel=name[:KERNEL_NAME]))
        record["calls"] += 1
        record["ms"] += kernel["dur"] / 1e3
    return sorted(found.values(), key=lambda record: -record["ms"])[:number]


def _kernels(events: Iterable[dict]) -> Iterator[tuple[str, dict]]:
    """Yield each kernel with its part."""
    events = [event for event in events if event.get("ph") == "X"]
    scopes = dict(_scopes_of_launches(events))
    for event in events:
        if event.get("cat") in ON_GPU:
            yield _part(event["name"], scopes.get(event["args"].get("correlation"), ())), event


def _part(kernel: str, scopes: tuple[str, ...]) -> str:
    if "nccl" in kernel.lower():
        return COMMUNICATION
    if CHECKPOINT in scopes:  # its backward runs a forward, and then the backward of it
        inner = scopes[len(scopes) - scopes[::-1].index(CHECKPOINT) :]
        if not any("Backward" in scope for scope in inner):
            return RECOMPUTE
    for scope in reversed(scopes):
        for part, pattern in PARTS.items():
            if re.search(pattern, scope):
                return OTHER if part == "linear layers" and not PRODUCT.search(kernel) else part
    return OTHER


def _scopes_of_launches(events: list[dict]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the correlation number of each launch with the names of the scopes around it, outermost first."""
    threads: dict[tuple, list[dict]] = defaultdict(list)
    for event in events:
        if event.get("cat") in (*SCOPES, *LAUNCHES):
            threads[event["pid"], event["tid"]].append(event)
    for calls in threads.values():
        open_scopes: list[dict] = []
        for event in sorted(calls, key=lambda one: (one["ts"], -one["dur"])):
            while open_scopes and open_scopes[-1]["ts"] + open_scopes[-1]["dur"] <= event["ts"]:
                open_scopes.pop()
            if event["cat"] in SCOPES:
                open_scopes.append(event)
            elif "correlation" in event.get("args", {}):
                yield event["args"]["correlation"], tuple(scope["name"] for scope in open_scopes)


def _busy(kernels: list[dict]) -> float:
    """Return the microseconds in which at least one kernel ran."""
    total, end = 0.0, 0.0
    for kernel in sorted(kernels, key=lambda one: one["ts"]):
        stop = kernel["ts"] + kernel["dur"]
        total += max(0.0, stop - max(end, kernel["ts"]))
        end = max(end, stop)
    return total


def ceilings() -> tuple[float, float]:
    """Return the FLOP/s of a large bf16 matrix product and the bytes per second of a copy, on this GPU now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product, copy = torch.empty_like(a), torch.empty(2**30, device="cuda", dtype=torch.uint8)
    source = torch.empty_like(copy)

    runs = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: copy.copy_(source)}
    seconds = {name: statistics.median(found) / 1e3 for name, found in milliseconds(runs, rounds=20).items()}
    return 2 * 8192**3 / seconds["product"], 2 * copy.nbytes / seconds["copy"]


def floors(config: Config, world: int, flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    """Return the least milliseconds of each part of a step on one GPU of ``world``, with one pipeline stage.

    Products run at the given rate, with the least number of them: attention's backward needs five where its forward
    needs two. What reads and writes memory does so once at the given rate. Both rates: see ``ceilings``.
    """
    shard, flops, model = RankShard(config, world), forward_flops(config), config.model
    batch = config.train.global_batch_size / world
    tokens = batch * config.data.seq_length
    products = {
        "linear layers": 3 * flops.layers,
        "attention": 3.5 * flops.attention,
        "fast weights": 3 * flops.fast,
        "cross-entropy": 3 * flops.logits,
        RECOMPUTE: recomputed_products(config) + recomputes_attention(config) * flops.attention,
    }
    heads = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    # bf16 values read and written, forward and backward: norms and residuals, SwiGLU, QK-norm with RoPE
    values = model.num_layers * tokens * (22 * model.hidden_size + 8 * model.ffn_hidden_size + 5 * heads)
    parameters = shard.parameters(0)
    # gradients set to zero, their norm; gradients read, three fp32 values read and written, weights written
    optimizer = 4 * parameters + (4 + 4 + 3 * 8) * parameters / shard.optimizer_shards + 2 * parameters
    floor = {name: 1e3 * batch * count / flops_per_second for name, count in products.items()}
    floor[OTHER] = 1e3 * 2 * values / bytes_per_second
    floor[OPTIMIZER] = 1e3 * optimizer / bytes_per_second
    return floor
