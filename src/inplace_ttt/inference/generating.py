"""Implement ``launch/generate.py``: continue a prompt or a file, or chat, in the terminal."""

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

MODEL is a run folder (its last checkpoint is used), a checkpoint, or a folder in Hugging Face format. Code in a model
folder is never executed. The answer is printed as it is generated. The text of --file comes before the prompt. Without
--prompt and --file the prompt is read from standard input.

  python launch/generate.py exported/ --prompt "Once upon a time"
  python launch/generate.py exported/ --file report.txt --prompt "In short:"
  python launch/generate.py exported/ --chat --book book.safetensors
"""
END = ("/exit", "/quit")


def main(words: list[str]) -> int:
    """Run the command line and return the exit code: 0 finished, 2 user error, 130 interrupted by Ctrl-C."""
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
        raise UserError("--static supports one answer only: add --prompt, or leave --static out of a conversation")
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
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue, or the question with --chat")
    parser.add_argument("--file", metavar="FILE", help="file with text before the prompt")
    parser.add_argument(
        "--chat", action="store_true", help="use the tokenizer's chat template; without a prompt: a conversation"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    parser.add_argument("--book", metavar="FILE", help="saved fast weights of a text (launch/read_book.py)")
    parser.add_argument("--fast-weights", default="on", metavar="MODE", help="on, off or clip=NUMBER (on)")
    parser.add_argument("--max-new-tokens", type=count, default=256, help="maximum tokens of an answer (256)")
    parser.add_argument("--temperature", type=_number(0, 100), default=0.0, help="sampling temperature; 0: greedy (0)")
    parser.add_argument("--top-p", type=_number(0, 1), default=1.0, help="nucleus sampling: cumulative probability (1)")
    parser.add_argument("--seed", type=seed, default=0, help="random seed for sampling (0)")
    parser.add_argument(
        "--static", action="store_true", help="static cache and CUDA graphs: fast decode after a minute of compilation"
    )
    parser.add_argument("--part", type=tokens, default=8192, help="tokens per prefill step (8k)")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto", help="auto: bf16 on a GPU")
    return parser


def _parse(words: list[str]) -> argparse.Namespace:
    options, rest = _parser().parse_mixed(words)
    options.models += rest
    if len(options.models) != 1:
        raise UserError(f"name one model, not {len(options.models)}: launch/generate.py --help shows the usage")
    options.model, options.mode = user_path(options.models[0]), FastWeightMode.parse(options.fast_weights)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError("launch/generate.py runs in one process: start it with python, not with torchrun")
    if options.system is not None and not options.chat:
        raise UserError("--system needs --chat: add --chat, or leave --system out")
    if 0 < options.temperature < 1e-4:
        raise UserError(f"--temperature {options.temperature} is too small: use 0 (greedy), or 0.0001 or more")
    if options.top_p == 0:
        raise UserError("--top-p 0 leaves no token to sample: use a number above 0")
    if options.book is not None and not options.mode.on:
        raise UserError("--book cannot be used with --fast-weights off: use --fast-weights on, or leave --book out")
    return options


def _number(least: float, most: float):
    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"'{word}' is not a number from {least} to {most}")
        return value

    return read


def _prompt(options: argparse.Namespace) -> str | None:
    """Return the text to continue or the question; None for a conversation. Raises UserError if there is no text."""
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
        raise UserError("there is no prompt: use --prompt, --file or --chat")
    text = "\n".join(part.rstrip("\n") if number < len(parts) - 1 else part for number, part in enumerate(parts))
    if not text:
        raise UserError("the prompt is empty: give some text to continue")
    for what, words in (("the prompt", text), ("--system", options.system or "")):
        if not is_text(words):
            raise UserError(f"{what} is not UTF-8 text")
    return text


def is_text(words: str) -> bool:
    """Return True if a string is valid Unicode: Python decodes invalid bytes of arguments to lone surrogates."""
    try:
        words.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _opened(options: argparse.Namespace) -> Iterator[LoadedModel]:
    """Load the model; a checkpoint is exported to a temporary folder that exists while the context is open."""
    named = ModelSource.find(options.model)
    if options.book is not None and not named.has_fast_weights:
        raise UserError(f"'{options.model}' has no fast weights: leave --book out, or name a model that has them")
    if options.mode.clip is not None and not named.has_fast_weights:
        raise UserError(f"--fast-weights {options.mode}: '{options.model}' has no fast weights to clip; use on or off")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = chosen_dtype(options.dtype)
    with tempfile.TemporaryDirectory(prefix="generate_") as work:
        yield open_model(named.export(Path(work)), options.model.name, options.mode, device, dtype)


def _book(options: argparse.Namespace, model: LoadedModel) -> FastWeights | None:
    if options.book is None:
        return None
    path = user_path(options.book)
    if not path.is_file():
        raise UserError(f"--book '{path}' is not a file: name a file that launch/read_book.py has written")
    try:
        book = model.network.load_fast_weights(str(path), tokenizer=model.tokenizer)
    except ValueError as error:
        raise UserError(f"--book: {error}") from error
    if book.rows != 1:
        raise UserError(f"--book '{path}' contains the fast weights of {book.rows} texts: use a book of one text")
    texts = book.texts[0] if book.texts else []
    read = ", ".join(f"{text.get('name') or 'a text'} ({text.get('tokens', '?')} tokens)" for text in texts)
    read = "".join(letter if letter.isprintable() else "?" for letter in read)  # names in the file are not trusted
    print(f"the book contains {read}" if read else "the book does not list its texts", file=sys.stderr)
    return book


def _messages(system: str | None, question: str) -> list[dict]:
    first = [] if system is None else [dict(role="system", content=system)]
    return [*first, dict(role="user", content=question)]


def chat_tokens(model: LoadedModel, messages: list[dict]) -> list[int]:
    """Return the token IDs of a conversation. Raises UserError if the tokenizer's chat template is missing or fails."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of '{model.name}' has no chat template: leave --chat out")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises any type
        raise UserError(f"the chat template of '{model.name}' fails ({one_line(error)}): leave --chat out") from error
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class _Streamer(TextStreamer):
    """Print an answer while it is generated; record the time of its first token and the number of tokens."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first: float | None = None  # time.perf_counter() at the first token
        self.count = -1  # the first call passes the prompt

    def put(self, value) -> None:
        """Count a token, note the time of the first one, and print the words that are complete.

        ``generate`` passes the token IDs of the prompt first, which are not printed, then one token per call.
        """
        self.count += 1
        if self.count == 1:
            self.first = time.perf_counter()
        super().put(value)


@dataclass
class Answered:
    """Hold a generated answer as text, and the token IDs of the whole sequence with its prompt."""

    tokens: list[int]  # token IDs of prompt and answer
    text: str  # text of the answer


def answer(model: LoadedModel, options: argparse.Namespace, ids: list[int], **more) -> Answered:
    """Print the continuation of a prompt while it is generated; return the prompt's and the answer's tokens.

    Args:
        ids: token IDs of the prompt; with ``past_key_values``, of the whole conversation.
        more: keyword arguments for ``generate``, such as past_key_values; None values are dropped.

    Raises UserError if the prompt is empty, has token IDs outside the vocabulary, or does not fit in memory.
    """
    network, tokenizer = model.network, model.tokenizer
    if not ids:
        raise UserError("the prompt has no tokens: give some text to continue")
    check_tokens(max(ids), network.config.vocab_size, model.name)
    ends = network.generation_config.eos_token_id
    ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None]
    sampling = dict(do_sample=False)
    if options.temperature > 0:
        sampling = dict(do_sample=True, temperature=options.temperature, top_p=options.top_p, top_k=0)
    prompt, cache = torch.tensor([ids], device=network.device), more.get("past_key_values")
    in_parts = getattr(network.config, "model_type", None) in FAMILIES  # other models may have other cache types
    settings = GenerationConfig(  # not the folder's config, which may set anything
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
        if cache is not None and in_parts:  # generate itself processes the last part
            with torch.no_grad():
                for start in range(known, len(ids) - options.part, options.part):
                    here = prompt[:, start : start + options.part]
                    network(here, past_key_values=cache, use_cache=True, logits_to_keep=1)
        out = network.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=streamer, **more
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{len(ids)} tokens do not fit in one GPU's memory with '{model.name}': use a shorter prompt"
        ) from error
    except OSError:  # writing the output failed
        raise
    except Exception as error:  # model code raises any type
        raise cannot_run(model, error) from error
    finished = time.perf_counter()
    written, first = out.shape[1] - len(ids), streamer.first or finished
    pace = f" at {(written - 1) / (finished - first):.1f} tokens per second" if written > 1 else ""
    print(
        f"[prefill: {len(ids) - known} tokens in {first - started:.1f} s; decode: {written} tokens{pace}]",
        file=sys.stderr,
        flush=True,
    )
    whole = out[0].tolist()
    return Answered(whole, tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))


class Chat:
    """Run a conversation in the terminal. Earlier turns stay in the cache; only new tokens are processed."""

    def __init__(self, model: LoadedModel, options: argparse.Namespace, book: FastWeights | None):
        self.model, self.options, self.book = model, options, book
        self.messages = [] if options.system is None else [dict(role="system", content=options.system)]
        self.cache, self.seen = None, []  # the cache and its token IDs

    def talk(self) -> None:
        """Read questions and print answers until the end of the input, or /exit."""
        chat_tokens(self.model, [*self.messages, dict(role="user", content="?")])  # fails before the first input
        print("Type a question; /exit or Ctrl-D ends, Ctrl-C stops an answer.", file=sys.stderr)
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
                print("[the question is not UTF-8 text: ask again]", file=sys.stderr)
            elif question:
                self.ask(question)

    def ask(self, question: str) -> None:
        """Answer one question; if the answer is stopped, the question is dropped from the conversation."""
        messages = [*self.messages, dict(role="user", content=question)]
        ids = chat_tokens(self.model, messages)
        if self.cache is None or ids[: len(self.seen)] != self.seen or len(ids) <= len(self.seen):
            self._begin()  # a template may change earlier turns, such as remove thinking
        given = dict(past_key_values=self.cache)
        try:
            answered = answer(self.model, self.options, ids, **given)
        except KeyboardInterrupt:
            print("\n[stopped: the question is dropped]", file=sys.stderr)
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
