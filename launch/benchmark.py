"""Measure the cost of fast weights on this machine; all variants run in turns.

python launch/benchmark.py layer                                   # one MLP layer: plain, materialised, loop, kernels
torchrun --nproc-per-node 2 launch/benchmark.py prefix             # exchange of carries between context-parallel ranks
python launch/benchmark.py model model.num_layers=12 ...           # a training step at Qwen3-4B's shapes
python launch/benchmark.py model train.fp8=hybrid --also train.fp8=null            # two precisions in the same run
python launch/benchmark.py model --profile                         # where its time goes, beside the least needed
torchrun --nproc-per-node 2 launch/benchmark.py attention parallel.context_parallel_size=2    # packed documents
python launch/benchmark.py decode --after 512 4096 32768 131072     # decode with the exported model
python launch/benchmark.py decode --after 2048 --rows 8 32 --tokens 2048
python launch/benchmark.py prefill                                 # prefill with the exported model
python launch/benchmark.py generate --rows 32 --length 2048        # time and memory of a batch, prompts included
python launch/benchmark.py book                                    # time to the first token after loading a book
python launch/benchmark.py serve --streams 8x4096 32x2048         # vLLM with the plugin inplace-ttt-vllm

It prints a table, and writes the results (JSON) and a plot to --output.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Configuration of commands that build a model, if no recipe is given
DEFAULT_MODEL = [
    "model=qwen3_4b",
    "run.name=benchmark",
    "data.kind=recall",
    "data.seq_length=32768",
    "data.reset_at_documents=false",
    "optim.lr=1e-5",
    "train.steps=1",
    "train.global_batch_size=1",
]


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not an integer of 1 or more")
    return int(word)


def _streams(word: str) -> tuple[int, int]:
    number, _, after = word.partition("x")
    return _positive(number), _positive(after)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="output folder (runs/benchmark)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("layer", "prefix"):
        command = commands.add_parser(name)
        command.add_argument(
            "--tokens", type=_positive, default=32768, help="tokens per sequence; prefix: per rank (32768)"
        )
        command.add_argument("--hidden", type=_positive, default=2560, help="hidden size d (2560, as Qwen3-4B)")
        command.add_argument("--ffn", type=_positive, default=9728, help="feed-forward size f (9728, as Qwen3-4B)")
        command.add_argument("--chunks", type=_positive, nargs="+", default=[512, 1024, 4096], help="chunk sizes")
        command.add_argument("--rounds", type=_positive, default={"layer": 7, "prefix": 15}[name])
        command.add_argument(
            "--documents",
            type=_positive,
            default=1,
            help="documents of equal length per sequence; prefix: over all ranks (1)",
        )
    layer, prefix = commands.choices["layer"], commands.choices["prefix"]
    layer.add_argument("--update-norms", action="store_true", help="compute update norms, as training does")
    layer.add_argument(
        "--variants",
        nargs="+",
        default=["materialised", "chunk loop", "kept", "recomputed"],
        choices=["materialised", "chunk loop", "kept", "recomputed", "clipped", "counted"],
        help="kept, recomputed: chunk weights; clipped: kept, all updates rescaled; counted: kept, with a histogram",
    )
    prefix.add_argument("--keep", action="store_true", help="keep chunk weights for the backward")
    prefix.add_argument("--prefix", choices=["ring", "ring_messages"], default="ring", help="as ttt.prefix (ring)")
    prefix.add_argument("--comm-dtype", choices=["fp32", "bf16"], default="fp32")
    model = commands.add_parser("model")
    overrides_help = "recipe=NAME and configuration keys, such as model.num_layers=12"
    model.add_argument("overrides", nargs="*", help=overrides_help)
    model.add_argument("--rounds", type=_positive, default=2)
    model.add_argument("--steps", type=_positive, default=3, help="timed steps per round (3)")
    model.add_argument(
        "--profile",
        action="store_true",
        help="a step's time by part, beside the least that each part needs",
    )
    model.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="KEYS",
        help="a further variant in the same run, with these keys, such as train.fp8=hybrid; can be repeated",
    )
    attention = commands.add_parser("attention")
    attention.add_argument("overrides", nargs="*", help=overrides_help)
    attention.add_argument(
        "--documents",
        type=_positive,
        nargs="+",
        default=[1, 8, 64],
        help="documents per sequence, of equal length (1 8 64)",
    )
    attention.add_argument("--kernels", action="store_true", help="also each kernel of Transformer Engine and of torch")
    attention.add_argument("--rounds", type=_positive, default=7)
    decode = commands.add_parser("decode")
    decode.add_argument("overrides", nargs="*", help=overrides_help)
    decode.add_argument(
        "--after", type=_positive, nargs="+", default=[512], help="tokens in the cache at the start (512)"
    )
    decode.add_argument("--rows", type=_positive, nargs="+", default=[1], help="batch sizes (1)")
    decode.add_argument("--tokens", type=_positive, default=128, help="tokens to decode per text (128)")
    decode.add_argument(
        "--caches", nargs="+", choices=["dynamic", "static"], default=["dynamic", "static"],
        help="caches of transformers; static caches compile for about a minute (both)",
    )  # fmt: skip
    prefill = commands.add_parser("prefill")
    prefill.add_argument("overrides", nargs="*", help=overrides_help)
    prefill.add_argument(
        "--lengths", type=_positive, nargs="+", default=[4096, 32768], help="prompt lengths (4096 32768)"
    )
    prefill.add_argument("--rounds", type=_positive, default=3)
    generate = commands.add_parser("generate")
    generate.add_argument("overrides", nargs="*", help=overrides_help)
    generate.add_argument("--rows", type=_positive, default=8, help="batch size (8)")
    generate.add_argument("--length", type=_positive, default=2048, help="prompt tokens per text (2048)")
    generate.add_argument("--part", type=_positive, default=512, help="tokens per part of a prompt read in parts (512)")
    generate.add_argument("--tokens", type=_positive, default=32, help="generated tokens per text (32)")
    book = commands.add_parser("book")
    book.add_argument("overrides", nargs="*", help=overrides_help)
    book.add_argument("--prompt", type=_positive, default=64, help="prompt tokens after the book (64)")
    book.add_argument("--rounds", type=_positive, default=7)
    serve = commands.add_parser("serve")
    serve.add_argument("overrides", nargs="*", help=overrides_help)
    serve.add_argument(
        "--streams", type=_streams, nargs="+", default=[(1, 4096), (8, 4096), (32, 2048)],
        help="requests at a time x tokens of their prompts (1x4096 8x4096 32x2048)",
    )  # fmt: skip
    serve.add_argument("--tokens", type=_positive, default=1024, help="tokens to decode per request (1024)")
    serve.add_argument("--prompts", type=_positive, nargs="+", default=[32768], help="prompts, first token (32768)")
    serve.add_argument("--rounds", type=_positive, default=3)
    serve.add_argument(
        "--vllm-python", help="interpreter of an environment with vLLM (this one, or that of .venv-vllm)"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    import torch

    from inplace_ttt.config import UserError
    from inplace_ttt.resilience.exits import fail
    from inplace_ttt.ttt import LayoutError

    try:
        if not torch.cuda.is_available():
            raise UserError("benchmarks need a CUDA GPU, but torch finds none: run them on a GPU node")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        records, more = COMMANDS[arguments.command](arguments)
    except (UserError, LayoutError) as error:
        return fail(f"error: {error}", 2)
    if int(os.environ.get("RANK", 0)) == 0:
        report(arguments, records, more)
    return 0


@contextlib.contextmanager
def fits(asked: str, smaller: str):
    """Raise UserError if the block runs out of device memory; ``smaller`` names what to reduce."""
    import torch

    from inplace_ttt.config import UserError

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{asked} does not fit in this GPU's memory: use {smaller}") from error


def shape_fits(arguments):
    sizes = f"--tokens={arguments.tokens} --hidden={arguments.hidden} --ffn={arguments.ffn}"
    chunks = " ".join(map(str, arguments.chunks))
    return fits(f"{sizes} --chunks {chunks}", "fewer tokens or larger chunks")


def run_layer(arguments):
    from inplace_ttt.benchmarks import layer

    shape = layer.Shape(arguments.tokens, arguments.hidden, arguments.ffn, arguments.documents)
    with shape_fits(arguments):
        records = layer.measure(shape, arguments.chunks, arguments.variants, arguments.rounds, arguments.update_norms)
        errors = []
        for size in arguments.chunks:  # fewer tokens for float64, but two chunks or more, so that an update is used
            tokens = min(arguments.tokens, max(min(8192, 16 * size), 2 * size * arguments.documents))
            small = layer.Shape(tokens, arguments.hidden, arguments.ffn, arguments.documents)
            for variant, found in layer.errors(small, size, arguments.variants).items():
                errors.append(dict(chunk_size=size, variant=variant, **found))
    return records, {"RMS error relative to the RMS of the float64 value": errors}


def run_prefix(arguments):
    import torch
    import torch.distributed as dist

    from inplace_ttt.benchmarks import layer, prefix
    from inplace_ttt.config import UserError
    from inplace_ttt.ttt.plan import make_plan

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world < 2:
        raise UserError("prefix exchanges carries between ranks: start it with torchrun --nproc-per-node 2 or more")
    shape = layer.Shape(arguments.tokens * world, arguments.hidden, arguments.ffn, arguments.documents)
    for size in arguments.chunks:  # raises LayoutError before a rank waits for another
        make_plan(shape.tokens, size, shape.bounds, world, 0)
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # as for Megatron's context-parallel group in training
    dist.init_process_group("nccl")
    comm_dtype = {"fp32": None, "bf16": torch.bfloat16}[arguments.comm_dtype]
    options = dict(keep_chunk_weights=arguments.keep, comm_dtype=comm_dtype, prefix=arguments.prefix)
    with shape_fits(arguments):
        records = prefix.measure(shape, arguments.chunks, options, arguments.rounds)
    dist.destroy_process_group()
    return records, {}


def run_model(arguments):
    from inplace_ttt.benchmarks import model
    from inplace_ttt.config import UserError

    config = training_configuration(arguments.overrides)
    others = {}
    for keys in arguments.also:
        other = training_configuration([*arguments.overrides, *keys.split()])
        if other.parallel != config.parallel:
            raise UserError(f"--also '{keys}' changes parallel.*: variants share their ranks' groups")
        others[f"on, {keys}"] = other
    asked = f"model.num_layers={config.model.num_layers} with data.seq_length={config.data.seq_length}"
    with fits(asked, "fewer layers, or train.recompute=auto"):
        if arguments.profile:
            if config.parallel.pipeline_model_parallel_size > 1:
                raise UserError("--profile supports one pipeline stage: set parallel.pipeline_model_parallel_size=1")
            parts, kernels = model.measure_parts(config, others, arguments.steps)
            return parts, {"the slowest kernels": kernels}
        return model.measure(config, others, arguments.rounds, arguments.steps), {}


def run_attention(arguments):
    from inplace_ttt.benchmarks import attention

    config = training_configuration(arguments.overrides)
    with fits(f"data.seq_length={config.data.seq_length}", "a shorter sequence"):
        return attention.measure(config, arguments.documents, arguments.rounds, arguments.kernels), {}


def run_decode(arguments):
    from inplace_ttt.benchmarks import decode

    with exported_models(arguments) as models:
        return decode.decode(models, arguments.after, arguments.rows, arguments.tokens, arguments.caches), {}


def run_prefill(arguments):
    from inplace_ttt.benchmarks import decode

    with exported_models(arguments) as models:
        return decode.prefill(models, arguments.lengths, arguments.rounds), {}


def run_generate(arguments):
    from inplace_ttt.benchmarks import decode

    with exported_models(arguments) as models:
        return decode.generate(models, arguments.rows, arguments.length, arguments.part, arguments.tokens), {}


def run_book(arguments):
    from inplace_ttt.benchmarks import decode

    with exported_models(arguments) as models:
        return decode.book(models, arguments.prompt, arguments.rounds), {}


def run_serve(arguments):
    from inplace_ttt.benchmarks import serve

    config, python = configuration(arguments.overrides), serve.python_with_vllm(arguments.vllm_python, ROOT)
    with fits(f"model.num_layers={config.model.num_layers}", "fewer layers, shorter prompts or fewer streams"):
        return serve.measure(
            config, python, arguments.streams, arguments.tokens, arguments.prompts, arguments.rounds, arguments.output
        ), {}


@contextlib.contextmanager
def exported_models(arguments):
    """Yield the exported models, with and without fast weights, on the GPU."""
    import torch

    from inplace_ttt.benchmarks.decode import Models

    config = configuration(arguments.overrides)
    with fits(f"model.num_layers={config.model.num_layers}", "fewer layers, shorter texts or fewer rows"):
        yield Models.build(config, torch.device("cuda", torch.cuda.current_device()))


def training_configuration(overrides: list[str]):
    """Return the configuration of the command line for these ranks. Raises UserError if they cannot run it."""
    from inplace_ttt.validation import check_hardware, validate

    config = configuration(overrides)
    validate(config, int(os.environ.get("WORLD_SIZE", 1)))
    check_hardware(config)
    return config


def configuration(overrides: list[str]):
    """Return the configuration of the command line; without a recipe it has Qwen3-4B's shapes.

    Raises UserError if the vocabulary size is not known.
    """
    from inplace_ttt.config import UserError
    from inplace_ttt.training.compose import compose_config, to_config

    if not any(override.startswith("recipe=") for override in overrides):
        overrides = [*DEFAULT_MODEL, *overrides]
    config = to_config(compose_config(overrides, ROOT / "recipes"))
    config.checkpoint.load = None
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size is not set, and benchmarks read no data that set it: add model.vocab_size=32768"
        )
    return config


COMMANDS = {
    "layer": run_layer,
    "prefix": run_prefix,
    "model": run_model,
    "attention": run_attention,
    "decode": run_decode,
    "prefill": run_prefill,
    "generate": run_generate,
    "book": run_book,
    "serve": run_serve,
}


def report(arguments, records: list[dict], more: dict[str, list[dict]]) -> None:
    import torch
    from rich.console import Console

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    machine = f"{ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, rows in {f"{arguments.command}: {machine}": records, **more}.items():
        console.print(_table(title, rows))
        for line in dict.fromkeys(f"{row['ttt']}: {row['recompute']}" for row in rows if "recompute" in row):
            console.print(f"fast weights {line}", highlight=False, markup=False, soft_wrap=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    words = [word for word in sys.argv[1:] if word not in ("--output", str(arguments.output))]
    start = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    result = dict(
        command=f"{start} launch/benchmark.py {' '.join(words)}",
        machine=machine,
        date=time.strftime("%F"),
        settings=settings,
        records=records,
        more=more,
    )
    name = "profile" if getattr(arguments, "profile", False) else arguments.command
    (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1))
    picture = arguments.output / f"{name}.png"
    draw(name, machine, records, picture)
    console.print(f"written: {picture.with_suffix('.json')}, {picture}", highlight=False)


def _table(title: str, rows: list[dict]):
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = [key for key in rows[0] if key != "recompute"]  # too long for a column: the report prints it below
    for key in columns:
        table.add_column(key.replace("_", " "), justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(escape(_shown(row[key])) for key in columns))
    return table


def _shown(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.3g}"
    return str(value)


def draw(command: str, machine: str, records: list[dict], picture: Path) -> None:
    """Draw the records of a command as a bar chart."""
    from inplace_ttt.plots import COLORS, axes, save

    groups, series, key, title, label = {
        "layer": ("chunk_size", "variant", "ratio", "One MLP layer, forward and backward", "time / plain MLP"),
        "prefix": ("chunk_size", "ranks", "exposed_share", "Exchange of carries between ranks", "share of layer time"),
        "model": ("layers", "ttt", "ratio", "A training step", "time / without fast weights"),
        "profile": ("part", "ttt", "ms", "A training step, by part", "milliseconds"),
        "attention": ("documents", "implementation", "ratio", "Attention, forward and backward", "time / torch's"),
        "decode": ("texts", "variant", "ratio", "Decode", "time per step / faster cache without fast weights"),
        "prefill": ("tokens", "variant", "ratio", "Prefill", "time / without fast weights"),
        "generate": ("prompt", "variant", "peak_gib", "Whole generations", "peak memory, GiB"),
        "book": ("prompt", "file", "load_ms", "Loading a book", "milliseconds"),
        "serve": ("case", "variant", "ratio", "Serving with vLLM", "tokens/s, or ms / vLLM without fast weights"),
    }[command]
    ranks = series == "ranks"
    names = list(dict.fromkeys(record[series] for record in records))
    places = list(dict.fromkeys(record[groups] for record in records))
    figure, ax = axes(title, groups.replace("_", " "), label, machine)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        values = {record[groups]: record[key] for record in records if record[series] == name}
        x = [places.index(place) + (number - (len(names) - 1) / 2) * width for place in values]
        is_base = not {"plain", "off", "torch"}.isdisjoint(str(name).split(", "))
        color = "#9aa4af" if is_base else COLORS[number % len(COLORS)]
        bars = ax.bar(x, list(values.values()), width * 0.92, color=color, label=f"{name} ranks" if ranks else name)
        ax.bar_label(bars, fmt="%.3f" if ranks else "%.2f", fontsize=8)
    ax.set_xticks(range(len(places)), [str(place) for place in places])
    ax.margins(y=0.22)
    ax.legend(frameon=False, ncols=len(names), loc="upper center")
    save(figure, picture)


if __name__ == "__main__":
    sys.exit(main())
