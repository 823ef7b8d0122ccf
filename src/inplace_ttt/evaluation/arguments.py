"""Parse the command line of ``launch/evaluate.py``. All options are checked before anything is loaded."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from inplace_ttt.config import UserError, check_key, schema_keys
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.files import user_path

HELP = """\
Evaluate models: launch/evaluate.py TASK MODEL [MODEL ...] [options] [key=value ...]

tasks
  position     loss by position in long documents
  final-block  loss on the last tokens of documents while the context before them grows
  ruler        the 13 tasks of RULER (arXiv 2404.06654), at any length
  needle       one needle in a haystack, by depth and length: a heat map
  harness      lm-evaluation-harness: HellaSwag, ARC, MMLU, PIQA and others

MODEL is a run folder (its last checkpoint is used), a checkpoint, an exported folder, or any other folder in Hugging
Face format. Code in a model folder is never executed. Several models, and several modes of --fast-weights, are
compared side by side. Separate list items with commas. Token counts can be written as 4k or 128k. Under torchrun, the
ranks share the samples. A training checkpoint is evaluated in the parallel layout of its run, or in the layout given by
key=value, such as parallel.context_parallel_size=8.

  python launch/evaluate.py position runs/tiny_ttt --fast-weights on,off
  torchrun --nproc-per-node 8 launch/evaluate.py ruler exported/ base/ --lengths 4k,32k,128k --samples 100

`launch/evaluate.py TASK --help` shows the options of a task. Rerun a stopped command to resume it."""

# Configuration keys that an evaluation may set: they change how a checkpoint is run, not the model
KEYS = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.sequence_parallel",
    "parallel.timeout_minutes",
    "model.transformer_impl",
    "train.precision",
    "train.eval_positions",
    "ttt.prefix",
    "ttt.comm_dtype",
)


@dataclass
class Arguments:
    """Hold the parsed command line; the options of the task are attributes of ``options``."""

    task: str
    models: list[Path]
    overrides: dict[str, object]
    modes: list[FastWeightMode]
    output: Path
    words: list[str]  # command line as given
    options: argparse.Namespace = field(repr=False)

    @property
    def timeout_minutes(self) -> float:
        """Return the minutes without progress after which a rank ends the job: parallel.timeout_minutes, or 10."""
        return self.overrides.get("parallel.timeout_minutes", 10.0)


class Parser(argparse.ArgumentParser):
    """Parse a command line; raise UserError instead of exiting if it is invalid."""

    def parse_mixed(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the options and the positional words between or after them.

        Raises UserError for an unknown option.
        """
        options, rest = self.parse_known_args(words)
        unknown = next((word for word in rest if word.startswith("-")), None)
        if unknown:
            task = f" {options.task}" if hasattr(options, "task") else ""
            raise UserError(f"unknown option {unknown}; {self.prog}{task} --help lists the options")
        return options, rest

    def error(self, message: str):
        """Raise UserError with argparse's message and a hint at --help, instead of exiting."""
        raise UserError(f"{message}; {self.prog} --help lists the options")


def parse(words: list[str]) -> Arguments:
    """Parse and check the command line. Raises UserError if it is invalid, SystemExit after --help."""
    parser = Parser(
        prog="launch/evaluate.py", usage=argparse.SUPPRESS, description=HELP, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    tasks = parser.add_subparsers(
        dest="task", required=True, metavar="TASK", parser_class=Parser, help=argparse.SUPPRESS
    )
    for name, (about, add) in OPTIONS.items():
        add_options(
            tasks.add_parser(name, description=about, allow_abbrev=False, prog=f"launch/evaluate.py {name}"), name, add
        )
    options, rest = parser.parse_mixed(words)
    named = [*options.models, *rest]
    models = [user_path(word) for word in named if not is_key(word)]
    overrides = dict(read_key(word) for word in named if is_key(word))
    if not models:
        raise UserError("no model is given: name a run, a checkpoint or a folder in Hugging Face format")
    modes = [FastWeightMode.parse(word) for word in options.fast_weights.split(",")]
    names = "_".join(dict.fromkeys(path.resolve().name for path in models))
    output = user_path(options.output or f"runs/evaluation/{options.task}_{names[:80]}")
    return Arguments(options.task, models, overrides, modes, output, list(words), options)


def add_options(parser: argparse.ArgumentParser, task: str, add: Callable) -> None:
    """Add the options that all tasks share to the parser of ``task``, then its own options with ``add``."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folder; or key=value, for training checkpoints")
    parser.add_argument(
        "--fast-weights", default="on", metavar="MODES", help="on, off, clip=NUMBER, or a list such as on,off (on)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help=f"folder for tables, samples, figures (runs/evaluation/{task}_MODELS)"
    )
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                        help="dtype of models in Hugging Face format; auto: bf16 on a GPU, else fp32")  # fmt: skip
    add(parser)


def _documents(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        type=_words,
        metavar="NAMES",
        help="prefix of a prepared corpus, or files and folders of text (held-out documents of the first run)",
    )
    parser.add_argument("--text-key", default="text", help="text field of .jsonl and .parquet files (text)")
    parser.add_argument("--samples", type=count, default=32, help="number of documents (32)")
    parser.add_argument("--seed", type=seed, default=0, help="seed for choosing documents of a corpus (0)")


def _position(parser: argparse.ArgumentParser) -> None:
    _documents(parser)
    parser.add_argument("--length", type=tokens, help="tokens read per document (the model's training length)")
    parser.add_argument("--min-length", type=tokens, help="minimum tokens per document (--length)")
    parser.add_argument(
        "--ranges", type=_token_list, metavar="EDGES", help="edges of the position ranges (eight equal ranges)"
    )


def _final_block(parser: argparse.ArgumentParser) -> None:
    _documents(parser)
    parser.add_argument(
        "--contexts",
        type=_token_list,
        metavar="TOKENS",
        help="tokens before the block (doubling up to the training length)",
    )
    parser.add_argument("--block", type=tokens, help="tokens whose loss is measured (an eighth of training length)")


def _answers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=42, help="seed for generating samples (42)")
    parser.add_argument(
        "--template", choices=["base", "chat"], default="base", help="chat: use the tokenizer's chat template (base)"
    )
    parser.add_argument(
        "--ruler-data", type=user_path, metavar="FOLDER", help="folder of RULER's .json files (an installed package)"
    )
    parser.add_argument(
        "--kept", type=user_path, default=Path("data/ruler"), metavar="FOLDER", help="sample cache (data/ruler)"
    )
    parser.add_argument("--workers", type=count, help="processes that generate samples (one per core)")
    parser.add_argument("--batch-tokens", type=tokens, help="prompt tokens per batch (default: fills the GPU)")


def _ruler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=_token_list, default=[4096], metavar="TOKENS", help="lengths, such as 4k,256k (4k)"
    )
    parser.add_argument("--tasks", type=_words, metavar="NAMES", help="tasks, such as niah_single_1,vt (all thirteen)")
    parser.add_argument(
        "--samples",
        type=count,
        default=500,
        help="samples per task and length (500); all thirteen tasks together need a length of about 4k or more",
    )
    _answers(parser)


def _needle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=_token_list, default=[1024, 2048, 4096], metavar="TOKENS",
                        help="columns of the heat map (1k,2k,4k)")  # fmt: skip
    parser.add_argument("--depths", type=_percents, default=[0, 25, 50, 75, 100], metavar="PERCENT",
                        help="rows of the heat map: depth of the needle (0,25,50,75,100)")  # fmt: skip
    parser.add_argument("--samples", type=count, default=10, help="samples per cell (10)")
    parser.add_argument(
        "--haystack",
        choices=["essay", "noise"],
        default="essay",
        help="essay: essays; noise: one repeated line (essay)",
    )
    _answers(parser)


def _harness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=_words,
        default=["hellaswag", "arc_easy", "arc_challenge", "mmlu", "piqa"],
        metavar="NAMES",
        help="tasks of lm-evaluation-harness (hellaswag,arc_easy,arc_challenge,mmlu,piqa)",
    )
    parser.add_argument("--num-fewshot", type=seed, help="examples before each question (the task's default)")
    parser.add_argument("--limit", type=count, help="questions per task (all)")
    parser.add_argument("--batch-size", type=count, default=8, help="questions per batch (8)")


OPTIONS = {
    "position": ("Measure the loss by position in long documents.", _position),
    "final-block": ("Measure the loss on the last tokens of documents while their context grows.", _final_block),
    "ruler": ("Score the thirteen tasks of RULER (Hsieh et al., arXiv 2404.06654).", _ruler),
    "needle": ("Score retrieval of one needle in a haystack, by depth and length.", _needle),
    "harness": ("Run lm-evaluation-harness (pip install lm-eval accelerate).", _harness),
}


def is_key(word: str) -> bool:
    """Return True if a word has the form key=value with a dotted key, rather than being the path of a model.

    A path that exists is a model, even if its name has this form.
    """
    name, equals, _ = word.partition("=")
    return bool(equals) and "/" not in name and "." in name and not Path(word).exists()


def read_key(word: str, keys: tuple[str, ...] = KEYS) -> tuple[str, object]:
    """Return the key and value of key=value. Raises UserError if the key is not in ``keys`` or the value is invalid."""
    name, _, text = word.partition("=")
    if name not in keys:
        there = "cannot be set by this command" if name in schema_keys() else "does not exist"
        raise UserError(f"{word}: the key {name} {there}: use one of {', '.join(keys)}")
    kind = schema_keys()[name].type
    try:
        if name == "train.eval_positions":
            return name, _token_list(text.strip("[]"))
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError, argparse.ArgumentTypeError) as error:
        what = "increasing numbers such as 0,1k,4k" if name == "train.eval_positions" else kind.__name__
        raise UserError(f"{word}: {name} takes {what}") from error
    check_key(name, value)
    return name, value


def tokens(word: str) -> int:
    """Parse a number of tokens, such as 4096 or 4k. Raises ArgumentTypeError if it is invalid."""
    number, factor = (word[:-1], 1024) if word[-1:] in "kK" and word else (word, 1)
    if not (number.isascii() and number.isdigit()) or len(number) > 9 or not 1 <= int(number) * factor <= 10**9:
        raise argparse.ArgumentTypeError(f"'{word}' is not a number of tokens: use a number such as 4096 or 4k")
    return int(number) * factor


def _token_list(word: str) -> list[int]:
    found = [0 if one.strip() == "0" else tokens(one.strip()) for one in word.split(",")]
    if sorted(set(found)) != found:
        raise argparse.ArgumentTypeError(f"'{word}' is not increasing: use increasing numbers such as 0,1k,4k")
    return found


def _percents(word: str) -> list[float]:
    try:
        found = [float(one) for one in word.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0 <= one <= 100 and one == round(one, 3) for one in found) or sorted(set(found)) != found:
        raise argparse.ArgumentTypeError(
            f"'{word}' is not a list of depths: use increasing numbers from 0 to 100, such as 0,12.5,100"
        )
    return [abs(one) for one in found]  # -0 is 0


def _words(word: str) -> list[str]:
    found = [one.strip() for one in word.split(",") if one.strip()]
    if not found:
        raise argparse.ArgumentTypeError("the list is empty: name at least one item")
    return found


def count(word: str) -> int:
    """Parse a whole number from 1 to 10 million. Raises ArgumentTypeError if it is invalid."""
    if not (word.isascii() and word.isdigit() and len(word) < 20) or not 1 <= int(word) <= 10**7:
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number from 1 to 10000000")
    return int(word)


def seed(word: str) -> int:
    """Parse a whole number from 0 to 2^31 - 1. Raises ArgumentTypeError if it is invalid."""
    if not (word.isascii() and word.isdigit() and len(word) < 20) or int(word) > 2**31 - 1:
        raise argparse.ArgumentTypeError(f"'{word}' is not a whole number from 0 to 2147483647")
    return int(word)
