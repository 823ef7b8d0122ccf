"""``launch/generate.py``: a prompt, a file or a chat, answered in the terminal."""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging

from inplace_ttt.command import run_command
from inplace_ttt.config import UserError, one_line
from inplace_ttt.evaluation.arguments import Parser, count, seed, tokens
from inplace_ttt.evaluation.generation import cannot_run
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import LoadedModel, ModelSource, check_tokens, chosen_dtype, open_model
from inplace_ttt.files import user_path
from inplace_ttt.hf.modeling_inplace_ttt import FastWeights
from inplace_ttt.models import FAMILIES

HELP = """\
Generate text: launch/generate.py MODEL [--prompt TEXT] [--file FILE] [--chat] [options]

MODEL is a run's folder (its last checkpoint), a checkpoint, or a folder in Hugging Face's format; code that lies in it
never runs. The answer appears as it is written. A file is read before the prompt; without either, standard input is.

  python launch/generate.py exported/ --prompt "Once upon a time"
  python launch/generate.py exported/ --file report.txt --prompt "In short:"
  python launch/generate.py exported/ --chat --book book.safetensors
"""
END = ("/exit", "/quit")


def main(words: list[str]) -> int:
    """Run the command line and return the exit code: 0, 2 the user must change something, 130 for Ctrl-C."""
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        _parser().print_help()
        return 0
    return run_command(lambda: _run(words), stopped="")


def _run(words: list[str]) -> None:
    options = _parse(words)
    logging.set_verbosity_error()
    prompt = _prompt(options)
    if options.static and prompt is None:
        raise UserError("--static is for one answer: leave it out of a conversation, or add --prompt")
    with _opened(options) as model:
        book = _book(options, model)
        if options.chat and prompt is None:
            Chat(model, options, book).talk()
            return
        if options.chat:
            ids = chat_tokens(model, _messages(options.system, prompt))
        else:
            ids = model.tokenizer(prompt, verbose=False)["input_ids"]
        answer(model, options, ids, fast_weights=book)


def _parser() -> Parser:
    parser = Parser(prog="launch/generate.py", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--prompt", metavar="TEXT", help="what the model goes on from, or with --chat is asked")
    parser.add_argument("--file", metavar="FILE", help="text that is read before the prompt")
    parser.add_argument(
        "--chat", action="store_true", help="by the tokenizer's chat template; without a prompt: a conversation"
    )
    parser.add_argument("--system", metavar="TEXT", help="what a chat begins with")
    parser.add_argument("--book", metavar="FILE", help="fast weights of what was read before (launch/read_book.py)")
    parser.add_argument("--fast-weights", default="on", metavar="MODE", help="on, off or clip=NUMBER (on)")
    parser.add_argument("--max-new-tokens", type=count, default=256, help="length of an answer (256)")
    parser.add_argument("--temperature", type=_number(0, 100), default=0.0, help="0: the likeliest token (0)")
    parser.add_argument("--top-p", type=_number(0, 1), default=1.0, help="the likeliest tokens of that share (1)")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn (0)")
    parser.add_argument("--static", action="store_true", help="static cache and CUDA graphs: fast, after a minute")
    parser.add_argument("--part", type=tokens, default=8192, help="tokens of a prompt that are read at a time (8k)")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU")
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    options, rest = _parser().parse_mixed(words)
    options.models += rest
    if len(options.models) != 1:
        raise UserError(f"name one model, not {len(options.models)}: launch/generate.py --help shows what there is")
    options.model, options.mode = user_path(options.models[0]), FastWeightMode.parse(options.fast_weights)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("launch/generate.py is one process: start it with python, not with torchrun")
    if options.system is not None and not options.chat:
        raise UserError("--system is what a chat begins with: add --chat")
    if 0 < options.temperature < 1e-4:
        raise UserError(f"--temperature {options.temperature} is next to nothing: use 0, or 0.0001 and more")
    if options.top_p == 0:
        raise UserError("--top-p 0 leaves no token to draw: use a number above 0")
    if options.book is not None and not options.mode.on:
        raise UserError("--book is kept in fast weights, which --fast-weights off leaves out")
    return options


def _number(least: float, most: float):
    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"'{word}' is no number from {least} to {most}")
        return value

    return read


def _prompt(options: argparse.Namespace) -> str | None:
    """Return the text to go on from; None: a conversation."""
    parts = []
    if options.file == "":
        raise UserError("--file is empty: name a file")
    if options.file is not None:
        path = user_path(options.file)
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"--file '{path}' is not UTF-8 text") from error
        except OSError as error:
            raise UserError(f"--file '{path}' cannot be read: {error.strerror}") from error
    if options.prompt is not None:
        parts.append(options.prompt)
    if not parts and sys.stdin is not None and not sys.stdin.isatty() and not options.chat:
        try:
            parts.append(sys.stdin.read())
        except UnicodeDecodeError as error:
            raise UserError("standard input is not UTF-8 text") from error
    if not parts:
        if options.chat and sys.stdin is not None:
            return None
        raise UserError("there is nothing to go on from: give --prompt, --file or --chat")
    text = "\n".join(part.rstrip("\n") if number < len(parts) - 1 else part for number, part in enumerate(parts))
    if not text:
        raise UserError("the prompt is empty: give some text to go on from")
    for what, words in (("the prompt", text), ("--system", options.system or "")):
        if not is_text(words):
            raise UserError(f"{what} is not UTF-8 text")
    return text


def is_text(words: str) -> bool:
    """Tell whether a string is text: Python makes halves of characters of bytes that are none."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _opened(options: argparse.Namespace) -> Iterator[LoadedModel]:
    """Open the model; a checkpoint is exported for it, into a folder that lasts as long."""
    named = ModelSource.find(options.model)
    if options.book is not None and not named.has_fast_weights:
        raise UserError(f"'{options.model}' has no fast weights, which --book is for")
    if options.mode.clip is not None and not named.has_fast_weights:
        raise UserError(f"--fast-weights {options.mode}: '{options.model}' has no fast weights to clip")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = chosen_dtype(options.dtype)
    with tempfile.TemporaryDirectory(prefix="generate_") as work:
        yield open_model(named.export(Path(work)), options.model.name, options.mode, device, dtype)


def _book(options: argparse.Namespace, model: LoadedModel) -> FastWeights | None:
    if options.book is None:
        return None
    path = user_path(options.book)
    if not path.is_file():
        raise UserError(f"--book '{path}' is no file")
    try:
        book = model.network.load_fast_weights(str(path), tokenizer=model.tokenizer)
    except ValueError as error:
        raise UserError(f"--book: {error}") from error
    if book.rows != 1:
        raise UserError(f"--book '{path}' holds {book.rows} texts, and one is asked")
    texts = book.texts[0] if book.texts else []
    read = ", ".join(f"{text.get('name') or 'a text'} ({text.get('tokens', '?')} tokens)" for text in texts)
    read = "".join(letter if letter.isprintable() else "?" for letter in read)  # names are whoever's
    print(f"the book holds {read}" if read else "the book does not say what it holds", file=sys.stderr)
    return book


def _messages(system: str | None, question: str) -> list[dict]:
    first = [] if system is None else [dict(role="system", content=system)]
    return [*first, dict(role="user", content=question)]


def chat_tokens(model: LoadedModel, messages: list[dict]) -> list[int]:
    """Return the tokens of a conversation. Raises UserError where the tokenizer's chat template cannot say them."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of '{model.name}' has no chat template: leave --chat out")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises anything
        raise UserError(f"the chat template of '{model.name}' fails ({one_line(error)}): leave --chat out") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class _Streamer(TextStreamer):
    """Prints an answer as it comes, and notes when it began and how long it is."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None
        self.count = -1  # the prompt comes first

    def put(self, value) -> None:
        self.count += 1
        if self.count == 1:
            self.first = time.perf_counter()
        super().put(value)


@dataclass
class Answered:
    """Hold what a generation has left."""

    tokens: list[int]  # of the prompt and the answer
    text: str  # of the answer


def answer(model: LoadedModel, options: argparse.Namespace, ids: list[int], **more) -> Answered:
    """Print the continuation of tokens as it is written. Raises UserError for a prompt that cannot be."""
    network, tokenizer = model.network, model.tokenizer
    if not ids:
        raise UserError("the prompt has no tokens: give some text to go on from")
    check_tokens(max(ids), network.config.vocab_size, model.name)
    ends = network.generation_config.eos_token_id
    ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None]
    sampling = dict(do_sample=False)
    if options.temperature > 0:
        sampling = dict(do_sample=True, temperature=options.temperature, top_p=options.top_p, top_k=0)
    prompt, cache = torch.tensor([ids], device=network.device), more.get("past_key_values")
    in_parts = getattr(network.config, "model_type", None) in FAMILIES  # others may have caches of their own kind
    settings = GenerationConfig(  # not the folder's own, which may ask for anything
        max_new_tokens=options.max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=min(ends, default=0),
        cache_implementation="static" if options.static else None,
        prefill_chunk_size=options.part if in_parts and cache is None and len(ids) > options.part else None,
        **sampling,
    )
    torch.manual_seed(options.seed)
    streamer, started = _Streamer(tokenizer), time.perf_counter()
    more = {key: value for key, value in more.items() if value is not None}
    try:
        known = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and in_parts:  # all but what generate reads itself
            with torch.no_grad():
                for start in range(known, len(ids) - options.part, options.part):
                    here = prompt[:, start : start + options.part]
                    network(here, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out = network.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=streamer, **more
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"'{model.name}' has no room for {len(ids)} tokens on one GPU: give it less to read") from error
    except OSError:  # of the output
        raise
    except Exception as error:  # a model's own code raises anything
        raise cannot_run(model, error) from error
    finished = time.perf_counter()
    written, first = out.shape[1] - len(ids), streamer.first or finished
    pace = f", then {(written - 1) / (finished - first):.1f} a second" if written > 1 else ""
    print(
        f"[{len(ids) - known} tokens read in {first - started:.1f} s, {written} written{pace}]",
        file=sys.stderr,
        flush=True,
    )
    whole = out[0].tolist()
    return Answered(whole, tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))


class Chat:
    """A conversation in the terminal. What was said stays in the cache; only what is new is read."""

    def __init__(self, model: LoadedModel, options: argparse.Namespace, book: FastWeights | None):
        self.model, self.options, self.book = model, options, book
        self.messages = [] if options.system is None else [dict(role="system", content=options.system)]
        self.cache, self.seen = None, []  # the tokens that the cache holds

    def talk(self) -> None:
        """Ask and answer until the end of the input, or /exit."""
        chat_tokens(self.model, [*self.messages, dict(role="user", content="?")])  # fails before anyone has typed
        print("Ask; /exit or Ctrl-D ends, Ctrl-C stops an answer.", file=sys.stderr)
        while True:
            try:
                question = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise UserError("standard input is not UTF-8 text") from error
            if question in END:
                return
            if not is_text(question):
                print("[that is not UTF-8 text: ask again]", file=sys.stderr)
            elif question:
                self.ask(question)

    def ask(self, question: str) -> None:
        """Answer one question; one whose answer is stopped is forgotten."""
        messages = [*self.messages, dict(role="user", content=question)]
        ids = chat_tokens(self.model, messages)
        if self.cache is None or ids[: len(self.seen)] != self.seen or len(ids) <= len(self.seen):
            self._begin()  # a template may change what was said, such as leave out thoughts
        given = dict(past_key_values=self.cache)
        try:
            answered = answer(self.model, self.options, ids, **given)
        except KeyboardInterrupt:
            print("\n[stopped: the question is forgotten]", file=sys.stderr)
            self.cache = None
            return
        self.messages = [*messages, dict(role="assistant", content=answered.text)]
        self.seen = answered.tokens[: int(self.cache.get_seq_length())]

    def _begin(self) -> None:
        from transformers import DynamicCache

        from inplace_ttt.hf.modeling_inplace_ttt import FastWeightCache

        network = self.model.network
        fast, self.seen = bool(getattr(network, "fast_mlps", None)), []
        self.cache = FastWeightCache(config=network.config) if fast else DynamicCache(config=network.config)
        if self.book is not None:
            self.cache.fast_weights = self.book.select([0])
