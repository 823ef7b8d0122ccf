"""Run tasks of lm-evaluation-harness, with this package's models, fast-weight modes and confidence intervals."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from inplace_ttt.config import UserError, one_line
from inplace_ttt.environment import World
from inplace_ttt.evaluation.arguments import Arguments
from inplace_ttt.evaluation.columns import EvaluatedModel
from inplace_ttt.evaluation.kinds import END, KINDS
from inplace_ttt.evaluation.models import EXPORTED, LoadedModel, open_model
from inplace_ttt.evaluation.results import Results
from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.hub import hub_is_reached
from inplace_ttt.job import SLOW_PHASE_FACTOR, Job, JobStopped
from inplace_ttt.megatron import runtime
from inplace_ttt.packages import version

METRICS = ("acc_norm", "acc", "exact_match")  # preferred metrics, in order; a task without them uses its first metric


class HarnessTask:
    """Run ``harness``: the requested tasks of lm-evaluation-harness, one after another."""

    takes_layouts = False

    def __init__(self, arguments: Arguments, asked: list[EvaluatedModel], world: World):
        """Look up the tasks. Raises UserError if a package is not installed or a task does not exist."""
        if not all(map(importlib.util.find_spec, ("lm_eval", "accelerate"))):
            raise UserError(
                "harness needs the packages lm-eval and accelerate, but they are not both installed: "
                "pip install lm-eval accelerate"
            )
        self.arguments, self.asked, self.options = arguments, asked, arguments.options
        self.manager = task_manager()
        self.tasks: dict[str, list[str]] = {}  # tasks by requested name: a group has several
        for name in self.options.tasks:
            if name not in self.manager.all_tasks:
                raise UserError(f"--tasks {name} is not a task of lm-evaluation-harness: `lm-eval ls tasks` lists them")
        self.models = list({one.model.path: one.model for one in asked}.values())
        for model in self.models:
            model.tokenizer()
        self.work = arguments.output / EXPORTED
        self.folders = {model.path: model.exported_to(self.work) for model in self.models}
        self.settings = dict(
            tasks=self.options.tasks, num_fewshot=self.options.num_fewshot, limit=self.options.limit,
            lm_eval=version("lm_eval"),
        )  # fmt: skip

    def prepare(self, job: Job) -> None:
        """Export runs and load the questions, on rank 0 first: the datasets library caches them for the other ranks."""
        job.watchdog.set_phase("loading the questions", 4 * SLOW_PHASE_FACTOR)

        def make() -> None:
            for model in self.models:
                model.export(self.work)
            for name in self.options.tasks:
                self._load(name)

        runtime.on_first_rank(make)
        for name in self.options.tasks:
            self.tasks[name] = sorted(self._load(name))

    def _load(self, name: str) -> dict:
        """Return the tasks of a task or group, by name. Raises UserError if their questions cannot be loaded."""
        from lm_eval.tasks import get_task_dict

        try:
            with quiet():
                return flat(get_task_dict([name], self.manager))
        except Exception as error:  # datasets raises any type
            out = "" if hub_is_reached() else "the Hugging Face hub is unreachable; "
            raise UserError(
                f"the questions of {name} cannot be loaded ({out}{one_line(error)}): run once with network access, "
                f"then the datasets library has them in its cache"
            ) from error

    def run(self, results: Results, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        """Run the tasks that ``results`` does not have yet. All ranks must call it.

        Raises JobStopped on all ranks if one received a stop request and tasks are left.
        """
        everything = list(dict.fromkeys(task for tasks in self.tasks.values() for task in tasks))
        for one in self.asked:
            left = [task for task in everything if not self._known(results, one, task)]
            if not left:
                continue
            job.watchdog.set_phase(f"loading {one.column.label}", SLOW_PHASE_FACTOR)
            model = open_model(self.folders[one.model.path], one.column.label, one.mode, device, dtype)
            with quiet():
                language_model = shared_model(model, job, self.options.batch_size)
            for number, task in enumerate(left, 1):
                job.watchdog.set_phase(f"{task} of {one.column.label}", 4 * SLOW_PHASE_FACTOR)
                if job.world.rank == 0:
                    print(f"harness of {one.column.label}: {task}, {number} of {len(left)}", flush=True)
                for record in self._ask(language_model, task, one):
                    results.add(record)
                if job.all_reduce_min(job.stop.received is None) == 0 and number < len(left):
                    raise JobStopped(
                        f"harness of {one.column.label} stopped on request: {number} of {len(left)} tasks are done; "
                        f"rerun the same command to resume", 130,
                    )  # fmt: skip

    def _known(self, results: Results, one: EvaluatedModel, task: str) -> bool:
        end = (one.column.digest, self._name(task), END)
        return end in results.known

    def _name(self, task: str) -> str:
        return f"{task}, {self.options.num_fewshot} shots, limit {self.options.limit}"

    def _ask(self, language_model, task: str, one: EvaluatedModel) -> Iterator[dict]:
        """Yield a record for each question and a final END record. Yields nothing on ranks other than rank 0."""
        import lm_eval

        with quiet():
            found = lm_eval.simple_evaluate(
                language_model,
                tasks=[task],
                task_manager=self.manager,
                num_fewshot=self.options.num_fewshot,
                limit=self.options.limit,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        if found is None:
            return
        common = dict(model=one.column.label, model_digest=one.column.digest, task=self._name(task), kind=task)
        for sample in found["samples"][task]:
            metric = next((name for name in METRICS if name in sample), sample["metrics"][0])
            value = sample[metric]
            if not isinstance(value, int | float):
                raise UserError(
                    f"--tasks {task}: its metric {metric} is not one number per question; leave this task out"
                )
            yield common | dict(
                sample=f"{sample['prompt_hash'][:16]}_{sample['doc_id']}_{sample['filter']}",
                index=sample["doc_id"],
                metric=metric,
                answer=str(sample["filtered_resps"])[:1000],
                references=[str(sample["target"])[:1000]],
                score=float(value),
            )
        yield common | dict(sample=END, index=10**9)

    def scores(self, results: Results) -> list[Scores]:
        """Return one table: the mean over the questions of each task or group of tasks."""
        by_model = {}
        for one in self.asked:
            by_task: dict[str, list[dict]] = {}
            asked = {self._name(task) for tasks in self.tasks.values() for task in tasks}
            for key, record in results.known.items():
                digest, task, sample = key
                if digest == one.column.digest and task in asked:
                    results.use(key)
                    if sample != END:
                        by_task.setdefault(task, []).append(record)
            by_model[one.column.label] = [
                record | dict(group=name)
                for name, tasks in self.tasks.items()
                for task in tasks
                for record in by_task.get(self._name(task), ())
            ]
        return [KINDS[self.arguments.task].table(by_model, self.settings)]


def task_manager():
    """Return the task manager of lm-evaluation-harness."""
    with quiet():
        from lm_eval.tasks import TaskManager

        return TaskManager()


def flat(tasks: dict) -> dict:
    """Return the tasks of nested groups in one dictionary by name."""
    found = {}
    for name, task in tasks.items():
        found |= flat(task) if isinstance(task, dict) else {name: task}
    return found


def shared_model(model: LoadedModel, job: Job, batch_size: int):
    """Return a model wrapped for lm-evaluation-harness; the ranks of the job share its questions."""
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        def __init__(self):
            super().__init__(pretrained=model.network, tokenizer=model.tokenizer, batch_size=batch_size)
            self._rank, self._world_size = job.world.rank, job.world.size

        def all_gather(self, tensor):
            found = [None] * job.world.size
            dist.all_gather_object(found, tensor.cpu())
            return torch.stack(found)

        def gather_object(self, obj, dst=0):
            found = [None] * job.world.size
            dist.all_gather_object(found, obj)
            return found if job.world.rank == dst else None

        def barrier(self):
            runtime.raise_on_all_ranks(None)

    return Shared()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress log messages below errors and the progress bars of lm-evaluation-harness and its libraries."""
    before, bars = logging.root.manager.disable, os.environ.get("TQDM_DISABLE")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        logging.disable(before)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
