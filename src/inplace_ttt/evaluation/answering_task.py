"""Run the answering tasks, RULER and needle in a haystack: prompts, the model's answers, and their scores."""

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from inplace_ttt.config import UserError
from inplace_ttt.environment import World
from inplace_ttt.evaluation.arguments import Arguments
from inplace_ttt.evaluation.columns import EvaluatedModel
from inplace_ttt.evaluation.generation import Prompt, Speed, answer, batches, tokens_that_fit
from inplace_ttt.evaluation.kinds import KINDS
from inplace_ttt.evaluation.models import EXPORTED, LoadedModel, open_model
from inplace_ttt.evaluation.results import Results
from inplace_ttt.evaluation.ruler import TASKS
from inplace_ttt.evaluation.ruler.fit import Sample
from inplace_ttt.evaluation.ruler.metric import score
from inplace_ttt.evaluation.ruler.needles import depth_task
from inplace_ttt.evaluation.ruler.prompts import Rendering, SampleRequest, samples_of
from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.evaluation.work_queue import ProgressMeter, WorkQueue, say_done
from inplace_ttt.job import SLOW_PHASE_FACTOR, Job
from inplace_ttt.megatron import runtime


class AnsweringTask:
    """Run ``ruler`` or ``needle``: let each model answer the same prompts (models with one tokenizer share prompts)."""

    takes_layouts = False

    def __init__(self, arguments: Arguments, asked: list[EvaluatedModel], world: World):
        """Check the options. Raises UserError if a task does not exist or the chat template is unusable."""
        self.arguments, self.asked, self.options = arguments, asked, arguments.options
        self.requests = sample_requests(arguments)
        self.models = list({one.model.path: one.model for one in asked}.values())
        for model in self.models:
            Rendering(model.tokenizer(), self.options.template, max(self.options.lengths))
        self.work = arguments.output / EXPORTED
        self.folders = {model.path: model.exported_to(self.work) for model in self.models}
        self.samples: dict[Path, dict[SampleRequest, list[Sample]]] = {}  # by model path
        self.settings = dict(
            lengths=self.options.lengths,
            samples=self.options.samples,
            seed=self.options.seed,
            template=self.options.template,
            tasks=list(dict.fromkeys(request.task for request in self.requests)),
        )

    def prepare(self, job: Job) -> None:
        """Export runs and generate samples on rank 0, then read the samples on all ranks."""
        job.watchdog.set_phase("generating samples", 4 * SLOW_PHASE_FACTOR)
        runtime.on_first_rank(self._make)
        job.watchdog.set_phase("reading samples", SLOW_PHASE_FACTOR)
        by_mark: dict[str, dict[SampleRequest, list[Sample]]] = {}
        for model in self.models:
            mark = model.fingerprint()
            if mark not in by_mark:
                by_mark[mark] = self._samples(self.folders[model.path], 1)
            self.samples[model.path] = by_mark[mark]

    def _make(self) -> None:
        made = set()
        for model in self.models:
            model.export(self.work)
            if model.fingerprint() in made:
                continue
            made.add(model.fingerprint())
            total = sum(request.count for request in self.requests)
            with contextlib.closing(ProgressMeter(f"generating samples for {model.path.name}", total)) as meter:
                workers = self.options.workers or len(os.sched_getaffinity(0))
                self._samples(self.folders[model.path], workers, meter.advance)

    def _samples(self, folder: Path, workers: int, progress: Callable[[], None] = lambda: None):
        return samples_of(self.requests, folder, self.options.ruler_data, self.options.kept, workers, progress)

    def _everything(self, one: EvaluatedModel) -> list[tuple[SampleRequest, Sample]]:
        return [(request, sample) for request, made in self.samples[one.model.path].items() for sample in made]

    def run(self, results: Results, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        """Answer the samples that ``results`` does not have yet. All ranks must call it."""
        for number, one in enumerate(self.asked):
            everything = self._everything(one)
            left = [
                (request, sample)
                for request, sample in everything
                if (one.column.digest, task_name(request), sample.digest) not in results.known
            ]
            if left:
                self._ask(one, number, left, len(everything) - len(left), results, job, device, dtype)
            elif job.world.rank == 0:
                say_done(f"{self.arguments.task} of {one.column.label}", len(everything))

    def _ask(self, one: EvaluatedModel, number: int, left: list[tuple[SampleRequest, Sample]], done: int,
             results: Results, job: Job, device: torch.device, dtype: torch.dtype) -> None:  # fmt: skip
        job.watchdog.set_phase(f"loading {one.column.label}", SLOW_PHASE_FACTOR)
        model = open_model(self.folders[one.model.path], one.column.label, one.mode, device, dtype)
        rendering = Rendering(model.tokenizer, self.options.template)
        most = job.all_reduce_min(self.options.batch_tokens or tokens_that_fit(model.network))
        groups = batches([(sample.tokens, sample.new_tokens) for _, sample in left], most)
        costs = [float(sum(left[i][1].tokens for i in group)) for group in groups]
        name = f"{self.arguments.task} of {one.column.label}"
        queue = WorkQueue(job, name, costs, [len(group) for group in groups], done, str(number))
        speed = Speed()
        for group, prompts in _ahead(queue, groups, left, rendering):
            for i, text in zip(group, answer(model, prompts, speed), strict=True):
                results.add(_record(one, *left[i], text))
        if job.world.rank == 0 and speed.read:
            print(f"{name}{', on rank 0' if job.world.size > 1 else ''}: {speed}", flush=True)
        _free(model)

    def scores(self, results: Results) -> list[Scores]:
        """Return one table: the score per length and task (or depth), and the mean per length."""
        by_model = {
            one.column.label: [
                results.use((one.column.digest, task_name(request), sample.digest))
                for request, sample in self._everything(one)
            ]
            for one in self.asked
        }
        return [KINDS[self.arguments.task].table(by_model, self.settings)]


def sample_requests(arguments: Arguments) -> list[SampleRequest]:
    """Return the requested samples, one entry per task and length. Raises UserError if a task does not exist."""
    options = arguments.options
    if arguments.task == "needle":
        tasks = [depth_task(options.haystack, depth) for depth in options.depths]
    else:
        tasks = options.tasks or list(TASKS)
        for task in tasks:
            if task not in TASKS:
                raise UserError(f"--tasks {task} is not a task of RULER: use {', '.join(TASKS)}")
        tasks = [task for task in TASKS if task in tasks]
    return [
        SampleRequest(task, length, options.samples, options.seed, options.template)
        for length in options.lengths
        for task in tasks
    ]


def task_name(request: SampleRequest) -> str:
    """Return the name of a request's samples in results."""
    return f"{request.task} at {request.length}"


def _record(one: EvaluatedModel, request: SampleRequest, sample: Sample, text: str) -> dict:
    return dict(
        model=one.column.label,
        model_digest=one.column.digest,
        task=task_name(request),
        sample=sample.digest,
        index=sample.index,
        length=request.length,
        kind=request.task,
        prompt_tokens=sample.tokens,
        answer=text,
        references=list(sample.answers),
        score=score(text, sample.answers, sample.any_answer),
    )


def _ahead(queue: WorkQueue, groups: list[list[int]], left: list[tuple[SampleRequest, Sample]],
           rendering: Rendering) -> Iterator[tuple[list[int], list[Prompt]]]:  # fmt: skip
    """Yield this rank's batches with their tokens; a thread tokenizes the next batch while one is answered."""

    def encode(group: list[int]) -> list[Prompt]:
        return [Prompt(i, tuple(rendering.encode(left[i][1].prompt)), left[i][1].new_tokens) for i in group]

    # a rank takes its next batch from the queue only when it starts it, so the index of the next batch is a guess
    with ThreadPoolExecutor(1) as thread:
        known: dict[int, Future] = {}
        for piece in queue:
            ready = known.pop(piece, None)
            prompts = encode(groups[piece]) if ready is None else ready.result()
            for old in known.values():
                old.cancel()
            likely = piece + queue.job.world.size
            known = {likely: thread.submit(encode, groups[likely])} if likely < len(groups) else {}
            yield groups[piece], prompts


def _free(model: LoadedModel) -> None:
    model.network.to("meta")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
