"""Estimate the memory, FLOPs and time of a run before it is submitted.

python launch/plan.py recipe=qwen3_4b_ttt_128k parallel=h100 --gpus 16
python launch/plan.py recipe=qwen3_4b_ttt parallel.context_parallel_size=2 --gpus 32 --gpu H200

If the run does not fit, it exits with code 2 and prints a parallel layout that fits.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from inplace_ttt.files import user_path

ROOT = Path(__file__).resolve().parent.parent
GIB, DAY = 2**30, 86400
VOCABULARY = 32_768  # assumed if neither the configuration nor the data set the size


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="recipe=NAME and configuration keys")
    parser.add_argument("--gpus", type=int, help="number of GPUs (default: the largest usable number up to 8)")
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own recipes, DIR/recipe/NAME.yaml")
    parser.add_argument("--gpu", type=str.upper, help="H100, H200 or A100 (default: that of parallel=..., else H100)")
    return parser.parse_intermixed_args()


def _amount(tokens: int) -> str:
    return f"{tokens / 1e9:.1f} billion" if tokens >= 1e8 else f"{tokens / 1e6:.1f} million"


def main() -> int:
    arguments = parse_arguments()
    from inplace_ttt import estimate
    from inplace_ttt.config import UserError
    from inplace_ttt.training.compose import compose_config, to_config, with_own
    from inplace_ttt.validation import validate

    try:
        if arguments.gpus is not None and not 1 <= arguments.gpus <= 2**20:
            raise UserError(f"--gpus {arguments.gpus}: use 1 to {2**20:,}")
        presets = [word.partition("=")[2].upper() for word in arguments.overrides if word.startswith("parallel=")]
        arguments.gpu = arguments.gpu or next((name for name in presets if name in estimate.GPUS), "H100")
        if arguments.gpu not in estimate.GPUS:
            raise UserError(f"--gpu {arguments.gpu} is not known: use one of {', '.join(estimate.GPUS)}")
        config = to_config(compose_config(arguments.overrides, with_own(ROOT / "recipes", arguments.config_dir)))
        assumed = assume(config)
        arguments.gpus = usable(config) if arguments.gpus is None else arguments.gpus
        validate(config, arguments.gpus)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120)
    for line in assumed:
        console.print(f"assumed: {line}", highlight=False, markup=False, soft_wrap=True)
    return report(console, config, arguments.gpus, estimate.GPUS[arguments.gpu])


def usable(config) -> int:
    """Return the largest number of GPUs up to 8 that the run can use, or 8 if there is none."""
    from inplace_ttt.config import UserError
    from inplace_ttt.validation import validate

    for count in range(8, 0, -1):
        try:
            validate(config, count)
        except UserError:
            continue
        return count
    return 8


def assume(config) -> list[str]:
    """Fill in values that the data and the checkpoint provide, which may not exist here; return the assumptions."""
    from inplace_ttt.data.prepare import read_description
    from inplace_ttt.data.recall import recall_vocab_size

    assumed = []
    if config.checkpoint.load is not None and not user_path(config.checkpoint.load).is_dir():
        assumed.append(
            f"checkpoint.load='{config.checkpoint.load}' does not exist here and will exist when the run starts"
        )
        config.checkpoint.load = None
    if config.model.vocab_size is None and config.data.kind == "recall":
        config.model.vocab_size = recall_vocab_size(config.data.recall_alphabet)
    if config.model.vocab_size is None:
        described = [read_description(str(user_path(source.path))) for source in config.data.sources[:1]]
        config.model.vocab_size = described[0].vocab_size if described and described[0] else VOCABULARY
        if config.model.vocab_size == VOCABULARY:
            assumed.append(
                f"a vocabulary of {VOCABULARY:,}: data.sources does not exist here, and model.vocab_size is not set"
            )
    return assumed


def report(console: Console, config, gpus: int, gpu) -> int:
    from inplace_ttt import estimate
    from inplace_ttt.fit import choose_recompute, describe_recompute, find_fitting_layout
    from inplace_ttt.flops import forward_flops

    asked, config = config, choose_recompute(config, gpus, gpu)
    memory, share = estimate.memory(config, gpus, gpu), estimate.RankShard(config, gpus)
    console.print(
        f"{config.run.name}: {gpus} x {gpu.name}, TP {share.tp} PP {share.pp} CP {share.cp} DP {share.dp}, "
        f"{share.tokens:,} tokens per GPU and micro batch, micro batches per step: {share.micro_batches}",
        highlight=False,
    )
    chosen = "chosen by train.recompute=auto: " if asked.train.recompute == "auto" else ""
    console.print(f"{chosen}{describe_recompute(config)}", highlight=False, markup=False, soft_wrap=True)
    table = Table(title="memory of the fullest GPU", title_justify="left")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for name, size in memory.persistent.items():
        table.add_row(name, f"{size / GIB:.1f}")
    for name, size in memory.transient.items():
        table.add_row(f"{name} (only the larger of the two counts)", f"{size / GIB:.1f}")
    table.add_row("peak of torch's allocations", f"{memory.allocated / GIB:.1f}", style="bold")
    table.add_row("with fragmentation and memory outside torch", f"{memory.needed / GIB:.1f}")
    table.add_row(f"available on {gpu.name}", f"{gpu.memory / GIB:.1f}")
    console.print(table)

    tokens = config.train.global_batch_size * config.data.seq_length
    flops = config.train.global_batch_size * forward_flops(config).training
    seconds = estimate.step_seconds(config, gpus, gpu)
    table = Table(title="work", title_justify="left")
    table.add_column("quantity")
    table.add_column("", justify="right")
    for name, value in (
        ("tokens per step", f"{tokens:,}"),
        ("tokens of the run", _amount(tokens * config.train.steps)),
        ("FLOPs per step, causal attention, without recompute", f"{flops:.2e}"),
        ("expected seconds per step", f"{seconds:.1f}"),
        ("expected tokens per second", f"{tokens / seconds:,.0f}"),
        ("expected MFU", f"{flops / seconds / gpus / gpu.peak:.0%}"),
        (f"expected days for {config.train.steps:,} steps", f"{seconds * config.train.steps / DAY:.1f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    if gpu.name == "A100":
        console.print("these times assume the kernels for Hopper GPUs, which an A100 lacks: TTT layers take longer")
    if memory.needed <= gpu.memory:
        console.print("it fits")
        return 0
    settings = find_fitting_layout(asked, gpus, gpu)
    helps = (
        f"it fits with {' '.join(settings)}" if settings else "no parallel layout of this many GPUs fits: use more GPUs"
    )
    lack = f"needs {memory.needed / GIB:.0f} GiB per GPU, but {gpu.name} has {gpu.memory / GIB:.0f}"
    print(f"error: {config.run.name} {lack}; {helps}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
