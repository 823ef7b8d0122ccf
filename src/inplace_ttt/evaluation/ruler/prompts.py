"""RULER's samples for a tokenizer: made once, by several processes, and kept in files.

A file ``TASK_LENGTH_SEED_TEMPLATE.jsonl`` lies in a folder named by the tokenizer and by what the samples are made of.
Sample i does not depend on how many there are: a file with more than are asked for is read as far as needed.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from inplace_ttt.config import UserError, one_line
from inplace_ttt.data.tokenizer import fingerprint, load_tokenizer
from inplace_ttt.environment import run_with_timeout
from inplace_ttt.evaluation.ruler import TASKS, make_tasks
from inplace_ttt.evaluation.ruler.fit import Fitter, Sample
from inplace_ttt.evaluation.ruler.needles import needle_at_depth
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft
from inplace_ttt.files import read_json_lines, write_text
from inplace_ttt.resilience.signals import end_with_parent

VERSION = 2  # of the generators: samples of others are made anew
BLOCK = 10  # samples that a process makes at a time
RENDER_TIMEOUT = 20.0  # seconds in which a chat template renders a short question
MIN_TOKENS_PER_WORKER = 3_000_000  # tokens of samples for which another process is started, which takes some seconds


@dataclass(frozen=True)
class SampleRequest:
    """Ask for samples of one task at one length."""

    task: str
    length: int
    count: int
    seed: int
    template: str  # base or chat

    @property
    def file(self) -> str:
        return f"{self.task}_{self.length}_{self.seed}_{self.template}.jsonl"


class Rendering:
    """Turn drafts into prompts of a tokenizer, by its chat template or without.

    The chat template, if any, wraps the question; the beginning of the answer follows it, as RULER has it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, longest: int | None = None):
        """Raises UserError where the tokenizer has no chat template and one is asked for, or one that is of no use.

        Args:
            longest: tokens of the longest prompt; None: the template is known to be of use.
        """
        self.tokenizer, self.template = tokenizer, template
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("--template chat: the model's tokenizer has no chat template; use --template base")
        if template == "chat" and longest is not None:
            self._check_template(longest)

    def _check_template(self, longest: int) -> None:
        """Raise UserError where the chat template, which is a program of its maker's, fails, runs on, or leaves out
        what is asked; with a short question, and with one that is about as long as prompts are."""
        failed: list[UserError] = []

        def run() -> bool:
            try:
                for words in (1, longest):
                    question = " ".join(["question"] * words)
                    prompt = self.render(Draft(question, "", ()))
                    if question not in prompt:
                        raise UserError("--template chat: the tokenizer's chat template leaves out the question")
                    if words == 1:
                        self.encode(prompt)
            except UserError as error:
                failed.append(error)
            return True

        if run_with_timeout(RENDER_TIMEOUT, run) is None:
            raise UserError(
                f"--template chat: the tokenizer's chat template makes no prompt in {RENDER_TIMEOUT:.0f} s; use "
                f"--template base"
            )
        if failed:
            raise failed[0]

    def render(self, draft: Draft) -> str:
        """Return the prompt of a draft."""
        if self.template == "base":
            return draft.prompt + draft.answer_prefix
        try:
            asked = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": draft.prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # a template raises anything
            raise UserError(f"--template chat: the tokenizer's chat template fails ({one_line(error)})") from error
        return asked + draft.answer_prefix

    def encode(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt, as the model reads it. A chat template names the special tokens itself."""
        try:
            return self.tokenizer(prompt, add_special_tokens=self.template == "base", verbose=False)["input_ids"]
        except (TypeError, UnicodeError) as error:  # half a character, which only a chat template can make
            raise UserError("--template chat: the tokenizer's chat template makes what is no text") from error


def samples_of(requests: list[SampleRequest], tokenizer_folder: Path, data: Path | None, kept: Path, workers: int,
               progress: Callable[[], None] = lambda: None) -> dict[SampleRequest, list[Sample]]:  # fmt: skip
    """Return the samples of each order, and keep those that were not there.

    Args:
        tokenizer_folder: where the tokenizer lies.
        data: RULER's files; None: an installed package.
        kept: the folder that keeps samples.
        progress: called after each sample.
    """
    folder = kept / _source(load_tokenizer(str(tokenizer_folder)), data)
    found = {request: read_kept(folder / request.file, request.count) for request in requests}
    lacking = [request for request in requests if found[request] is None]
    if lacking:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--kept '{kept}' cannot hold samples ({error.strerror}): name another folder") from error
        lacking.sort(key=lambda request: -request.length)
        made: dict[SampleRequest, dict[int, Sample]] = {request: {} for request in lacking}
        for request, samples in _made(lacking, partial(_start, str(tokenizer_folder), data), workers):
            made[request] |= {sample.index: sample for sample in samples}
            for _ in samples:
                progress()
            if len(made[request]) == request.count:
                found[request] = [made[request][index] for index in range(request.count)]
                write_text(folder / request.file, "".join(json.dumps(asdict(one)) + "\n" for one in found[request]))
    return found


def read_kept(path: Path, count: int) -> list[Sample] | None:
    """Return the first samples of a file; None where it does not hold as many."""
    records, bad = read_json_lines(path)
    try:
        samples = [Sample(**{**record, "answers": tuple(record["answers"])}) for record in records[:count]]
    except (TypeError, KeyError):
        return None
    whole = not bad and [sample.index for sample in samples] == list(range(count))
    return samples if whole else None


def _made(requests: list[SampleRequest], start: Callable, workers: int) -> Iterator[tuple[SampleRequest, list[Sample]]]:
    """Yield samples as they are made: first how large the haystack of each order is, then blocks, in any order."""
    blocks = [(request, range(first, min(first + BLOCK, request.count)))
              for request in requests for first in range(0, request.count, BLOCK)]  # fmt: skip
    tokens = sum(request.count * request.length for request in requests)
    workers = min(workers, len(blocks), 1 + tokens // MIN_TOKENS_PER_WORKER)
    if workers < 2:
        start()
        sizes = _sizes(requests, map(_size, requests))
        yield from map(_make, [(sizes[request], request, indices) for request, indices in blocks])
        return
    context = multiprocessing.get_context("forkserver")  # one process imports libraries, for all
    context.set_forkserver_preload([__name__])
    with context.Pool(workers, _start_process, (start,)) as pool:
        sizes = _sizes(requests, pool.imap(_size, requests))
        yield from pool.imap_unordered(_make, [(sizes[request], request, indices) for request, indices in blocks])


_process: dict = {}  # what a process that makes samples keeps between blocks


def _start_process(start: Callable) -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start()


def _start(tokenizer_folder: str, data: Path | None) -> None:
    _process.update(tokenizer=load_tokenizer(tokenizer_folder), sources=Sources(data))


def _size(request: SampleRequest) -> int | str:
    """Return the size of an order's haystack, or why there is none."""
    try:
        return _fitter(request).size
    except UserError as error:
        return str(error)


def _sizes(requests: list[SampleRequest], found: Iterable[int | str]) -> dict[SampleRequest, int]:
    """Return the sizes by order. Raises UserError with all reasons why there are not some."""
    sizes = dict(zip(requests, found, strict=True))
    reasons = list(dict.fromkeys(size for size in sizes.values() if isinstance(size, str)))
    if reasons:
        raise UserError("; ".join(reasons))
    return sizes


def _make(block: tuple[int, SampleRequest, range]) -> tuple[SampleRequest, list[Sample]]:
    size, request, indices = block
    fitter = _fitter(request, size)
    return request, [fitter.sample(index) for index in indices]


def _fitter(request: SampleRequest, size: int | None = None) -> Fitter:
    rendering = Rendering(_process["tokenizer"], request.template)

    def count_tokens(text: str) -> int:
        return len(rendering.encode(text))

    sources = _process["sources"]
    if request.task in TASKS:
        task = make_tasks(sources, count_tokens, request.seed)[request.task]
    else:
        task = needle_at_depth(request.task, sources)
    return Fitter(task, request.length, request.seed, rendering.render, count_tokens, size)


def _source(tokenizer: PreTrainedTokenizerBase, data: Path | None) -> str:
    """Return a name for what samples are made of: the tokenizer, how it begins texts, its chat template, the data."""
    facts = [VERSION, fingerprint(tokenizer), tokenizer("a")["input_ids"], tokenizer.chat_template]
    facts.append([[str(path), os.path.getsize(path)] for path in sorted(data.glob("*.json"))] if data else None)
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
