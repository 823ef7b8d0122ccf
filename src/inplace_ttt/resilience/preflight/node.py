"""Check one node before training: hardware, drivers and packages, with the effect of each on training."""

import functools
import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from enum import Enum

from inplace_ttt import te
from inplace_ttt.config import UserError, first_line
from inplace_ttt.figures import find
from inplace_ttt.packages import version


class State(Enum):
    """List the results of a check; the values are the words that launch/preflight.py prints."""

    THERE = "ok"
    LACKING = "warning"  # training runs, possibly slower
    BROKEN = "failed"  # training does not run


@dataclass(frozen=True)
class Finding:
    """Hold the result of one check."""

    part: str  # name of the checked part
    state: State
    found: str  # version, or what is wrong
    meaning: str  # effect on training, or how to fix it


def python() -> Finding:
    """Check that the version of Python is 3.12."""
    found = platform.python_version()
    if not found.startswith("3.12."):
        return Finding("Python", State.BROKEN, found, "install Python 3.12: the pinned packages need it")
    return Finding("Python", State.THERE, found, "")


def packages() -> list[Finding]:
    """Check that the packages that training needs are installed; return a finding for each."""
    findings = []
    for package in ("torch", "megatron-core", "hydra-core", "transformers", "datasets"):
        found = version(package)
        state = State.THERE if found else State.BROKEN
        findings.append(Finding(package, state, found or "not installed", "" if found else "pip install -e ."))
    return findings


def gpus() -> Finding:
    """Check that there are GPUs of one type, and that a kernel runs on the current one."""
    import torch

    if not torch.cuda.is_available():
        why = (
            "torch is a CPU build"
            if torch.version.cuda is None
            else "torch finds no GPU: check the driver and container flags"
        )
        return Finding("GPU", State.LACKING, why, "training runs on the CPU in fp32: for trials only")
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = {f"{p.name} {p.total_memory / 2**30:.0f} GiB" for p in properties}
    found = f"{len(properties)} x {' and '.join(sorted(names))}, CUDA {torch.version.cuda}"
    if len(names) > 1:
        return Finding("GPU", State.LACKING, found, "GPUs differ: every step waits for the slowest one")
    try:
        torch.ones(8, device="cuda").sum().item()
    except RuntimeError as error:
        return Finding("GPU", State.BROKEN, first_line(error)[:120], f"a kernel fails on {found}")
    return Finding("GPU", State.THERE, found, "bf16 training")


def nccl() -> Finding:
    """Check that torch can use NCCL."""
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return Finding("NCCL", State.LACKING, "not usable", "multi-process runs use gloo on the CPU")
    found = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("NCCL", State.THERE, found, "carries and gradients are transferred directly between GPUs")


def _times(variant: str) -> str:
    """Return the measured time of a TTT layer relative to a plain MLP, as a range over chunk sizes."""
    found = [find("layer_h100", "ratio", variant=variant, chunk_size=size) for size in (4096, 512)]
    least, most = (one if isinstance(one, list) else [one] for one in found)
    return f"{least[0]:.1f} to {most[-1]:.1f}"


def kernels() -> Finding:
    """Run a fast-weight kernel and compare its result with the reference in fp64."""
    import torch

    part = "fast-weight kernels"
    costs = f"a TTT layer takes {_times('chunk loop')} times a plain MLP instead of {_times('kept')} (H100)"
    if not torch.cuda.is_available():
        return Finding(part, State.LACKING, "need a Hopper GPU", costs)
    try:
        from inplace_ttt.ttt import fast_weight_linear, naive
        from inplace_ttt.ttt.backends import hopper_unavailable_reason
        from inplace_ttt.ttt.rule import PAPER_RULE

        torch.manual_seed(0)
        shapes = (256, 1, 128), (256, 1, 64), (64, 128)
        operands = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
        reason = hopper_unavailable_reason(operands[0], 64, chunk_size=64, eta=0.01, rule=PAPER_RULE)
        if reason is not None:
            return Finding(part, State.LACKING, reason, costs)
        out = fast_weight_linear(*operands, eta=0.01, chunk_size=64)
        exact = naive.fast_weight_linear(*(t.double() for t in operands), eta=0.01, chunk_size=64)
        error = ((out.double() - exact).norm() / exact.norm()).item()
    except Exception as error:
        return Finding(part, State.BROKEN, first_line(error)[:120], "a kernel does not run: check the C compiler")
    if not error < 1e-2:
        return Finding(part, State.BROKEN, f"relative error {error:.0e}", "do not train on this machine")
    found = f"Triton {version('triton')}, relative error {error:.0e}"
    return Finding(part, State.THERE, found, "TTT layers run at kernel speed")


def compiler() -> Finding:
    """Check that a C compiler is on the PATH."""
    found = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if found:
        return Finding("C compiler", State.THERE, found, "Triton and torch.compile use it to build launchers")
    return Finding("C compiler", State.LACKING, "no gcc, cc or clang", "kernels that are not cached cannot start")


def transformer_engine() -> Finding:
    """Check whether Transformer Engine can be used, and that it does not break megatron-core."""
    part = "Transformer Engine"
    lack = "unfused norms and linears, attention gathers keys and values, separate pass for gradient accumulation"
    try:
        why = te.unavailable_reason()
    except UserError as error:
        return Finding(part, State.BROKEN, str(error), "megatron-core cannot be imported")
    if why is not None:
        return Finding(part, State.LACKING, why, f"{lack}: pip install -e '.[gpu]', or NVIDIA's image")
    return Finding(
        part,
        State.THERE,
        version(te.PACKAGE) or "unknown version",
        "fused norms and linears, cuDNN attention, also with context parallelism",
    )


def adam() -> Finding:
    """Check whether the optimizer has a fused Adam, of Transformer Engine or apex."""
    part = "fused Adam"
    if transformer_engine().state is State.THERE:
        return Finding(part, State.THERE, "Transformer Engine's", "one kernel for all parameters")
    if importlib.util.find_spec("amp_C") is not None:
        return Finding(part, State.THERE, f"apex {version('apex') or ''}".strip(), "one kernel for all parameters")
    return Finding(part, State.LACKING, "neither Transformer Engine's nor apex's", "one small kernel per parameter")


def apex() -> Finding:
    """Check whether NVIDIA's apex is installed, and not the other package of that name."""
    found = importlib.util.find_spec("amp_C")
    if found is not None:
        return Finding("apex", State.THERE, version("apex") or "unknown version", "")
    if version("apex"):
        wrong = f"{version('apex')} is the web toolkit of that name, not NVIDIA's"
        return Finding("apex", State.LACKING, wrong, "pip uninstall apex; not needed with Transformer Engine")
    return Finding("apex", State.LACKING, "not installed", "not needed with Transformer Engine")


def wire() -> Finding:
    """Check the NVLink connections between the GPUs of this node."""
    import torch

    part = "NVLink"
    if torch.cuda.device_count() < 2:
        return Finding(part, State.LACKING, "fewer than two GPUs", "NVLink is not needed")
    joined = all(
        torch.cuda.can_device_access_peer(a, b)
        for a in range(torch.cuda.device_count())
        for b in range(torch.cuda.device_count())
        if a != b
    )
    links = _nvlinks()
    if joined and links:
        return Finding(part, State.THERE, f"{links} links at GPU 0", "carries within the node use NVLink")
    found = "peer access without NVLink" if joined else "no peer access between GPUs"
    return Finding(part, State.LACKING, found, "context-parallel transfers are slow: use fewer context-parallel ranks")


@functools.cache
def _nvlinks() -> int:
    try:
        done = subprocess.run(["nvidia-smi", "nvlink", "-s", "-i", "0"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return done.stdout.count("GB/s")


def examine(light: bool = False) -> list[Finding]:
    """Run all checks of this node, essential ones first; stop after a failed essential check.

    ``light``: skip checks that use GPU memory, which a training may need completely.
    """
    findings = [python(), *packages()]
    if any(finding.state is State.BROKEN for finding in findings):
        return findings
    return [
        *findings,
        *([] if light else [gpus()]),
        nccl(),
        wire(),
        compiler(),
        *([] if light else [kernels()]),
        transformer_engine(),
        adam(),
        apex(),
    ]
