"""Make samples of RULER for a tokenizer, generated once by several processes and cached in files.

A file ``TASK_LENGTH_SEED_TEMPLATE.jsonl`` is in a folder named by a hash of the tokenizer and the source data. Sample i
does not depend on the number of samples, so a file with more samples than requested is reused.
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
from inplace_ttt.environment import run_with_timeout
from inplace_ttt.evaluation.ruler import TASKS, make_tasks
from inplace_ttt.evaluation.ruler.fit import Fitter, Sample
from inplace_ttt.evaluation.ruler.needles import needle_at_depth
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft
from inplace_ttt.files import read_json_lines, write_text
from inplace_ttt.hf.tokenizer import fingerprint, load_tokenizer
from inplace_ttt.resilience.signals import end_with_parent

VERSION = 2  # version of the generators; cached samples of other versions are not used
BLOCK = 10  # samples that a process generates per task
RENDER_TIMEOUT = 20.0  # time limit in seconds for checking a chat template
MIN_TOKENS_PER_WORKER = 3_000_000  # sample tokens per additional process, whose start takes some seconds


@dataclass(frozen=True)
class SampleRequest:
    """Describe requested samples of one task at one length."""

    task: str
    length: int
    count: int
    seed: int
    template: str  # base or chat

    @property
    def file(self) -> str:
        """Return the name of the cached file. It does not contain ``count``: a file with more samples is reused."""
        return f"{self.task}_{self.length}_{self.seed}_{self.template}.jsonl"


class Rendering:
    """Render drafts as prompts for a tokenizer, with or without its chat template.

    The chat template wraps only the question; the answer prefix follows it, as in RULER.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, longest: int | None = None):
        """Check the chat template, if one is requested.

        Raises UserError if the tokenizer has no chat template, or an unusable one.

        Args:
            template: ``base`` (no template) or ``chat``.
            longest: tokens of the longest prompt; None: the template was checked before.
        """
        self.tokenizer, self.template = tokenizer, template
        if template == "chat" and not tokenizer.chat_template:
            raise UserError("--template chat: the model's tokenizer has no chat template; use --template base")
        if template == "chat" and longest is not None:
            self._check_template(longest)

    def _check_template(self, longest: int) -> None:
        """Raise UserError if the chat template fails, exceeds the time limit, or drops the question.

        A chat template is an untrusted program. It is checked with a short question and with one of about the length
        of the longest prompt.
        """
        failed: list[UserError] = []

        def run() -> bool:
            try:
                for words in (1, longest):
                    question = " ".join(["question"] * words)
                    prompt = self.render(Draft(question, "", ()))
                    if question not in prompt:
                        raise UserError(
                            "--template chat: the tokenizer's chat template drops the question; use --template base"
                        )
                    if words == 1:
                        self.encode(prompt)
            except UserError as error:
                failed.append(error)
            return True

        if run_with_timeout(RENDER_TIMEOUT, run) is None:
            raise UserError(
                f"--template chat: the tokenizer's chat template returns no prompt within {RENDER_TIMEOUT:.0f} s; use "
                f"--template base"
            )
        if failed:
            raise failed[0]

    def render(self, draft: Draft) -> str:
        """Return the prompt of a draft. Raises UserError if the chat template fails."""
        if self.template == "base":
            return draft.prompt + draft.answer_prefix
        try:
            asked = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": draft.prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # a template raises any type
            raise UserError(
                f"--template chat: the tokenizer's chat template fails ({one_line(error)}); use --template base"
            ) from error
        return asked + draft.answer_prefix

    def encode(self, prompt: str) -> list[int]:
        """Return the token IDs of a prompt. With a chat template no special tokens are added: the template has them."""
        try:
            return self.tokenizer(prompt, add_special_tokens=self.template == "base", verbose=False)["input_ids"]
        except (TypeError, UnicodeError) as error:  # a lone surrogate, which only a chat template can produce
            raise UserError(
                "--template chat: the tokenizer's chat template produces invalid Unicode; use --template base"
            ) from error


def samples_of(requests: list[SampleRequest], tokenizer_folder: Path, data: Path | None, kept: Path, workers: int,
               progress: Callable[[], None] = lambda: None) -> dict[SampleRequest, list[Sample]]:  # fmt: skip
    """Return the samples of each request; generate and cache those that are missing.

    Args:
        tokenizer_folder: folder of the tokenizer.
        data: folder of RULER's source files; None: use the installed package.
        kept: cache folder of samples.
        workers: maximum number of processes.
        progress: called after each generated sample.

    Raises UserError if the cache folder cannot be created, or a length is too short for a task.
    """
    folder = kept / _source(load_tokenizer(str(tokenizer_folder)), data)
    found = {request: read_kept(folder / request.file, request.count) for request in requests}
    lacking = [request for request in requests if found[request] is None]
    if lacking:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--kept '{kept}' cannot be written ({error.strerror}): use another folder") from error
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
    """Return the first ``count`` samples of a file; None if it is missing, damaged or has fewer."""
    records, bad = read_json_lines(path)
    try:
        samples = [Sample(**{**record, "answers": tuple(record["answers"])}) for record in records[:count]]
    except (TypeError, KeyError):
        return None
    whole = not bad and [sample.index for sample in samples] == list(range(count))
    return samples if whole else None


def _made(requests: list[SampleRequest], start: Callable, workers: int) -> Iterator[tuple[SampleRequest, list[Sample]]]:
    """Yield samples as they are generated, in any order. The haystack sizes of all requests are determined first."""
    blocks = [(request, range(first, min(first + BLOCK, request.count)))
              for request in requests for first in range(0, request.count, BLOCK)]  # fmt: skip
    tokens = sum(request.count * request.length for request in requests)
    workers = min(workers, len(blocks), 1 + tokens // MIN_TOKENS_PER_WORKER)
    if workers < 2:
        start()
        sizes = _sizes(requests, map(_size, requests))
        yield from map(_make, [(sizes[request], request, indices) for request, indices in blocks])
        return
    context = multiprocessing.get_context("forkserver")  # libraries are imported once, in the server process
    context.set_forkserver_preload([__name__])
    with context.Pool(workers, _start_process, (start,)) as pool:
        sizes = _sizes(requests, pool.imap(_size, requests))
        yield from pool.imap_unordered(_make, [(sizes[request], request, indices) for request, indices in blocks])


_process: dict = {}  # tokenizer and sources of a worker process


def _start_process(start: Callable) -> None:
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    start()


def _start(tokenizer_folder: str, data: Path | None) -> None:
    _process.update(tokenizer=load_tokenizer(tokenizer_folder), sources=Sources(data))


def _size(request: SampleRequest) -> int | str:
    """Return the haystack size of a request, or the error message if no size fits."""
    try:
        return _fitter(request).size
    except UserError as error:
        return str(error)


def _sizes(requests: list[SampleRequest], found: Iterable[int | str]) -> dict[SampleRequest, int]:
    """Return the haystack sizes by request. Raises UserError with the messages of all requests without one."""
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
    """Return a hash of all inputs of the samples: generator version, tokenizer, its special tokens, template, data."""
    facts = [VERSION, fingerprint(tokenizer), tokenizer("a")["input_ids"], tokenizer.chat_template]
    facts.append([[str(path), os.path.getsize(path)] for path in sorted(data.glob("*.json"))] if data else None)
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]
