"""Evaluate models: the steps that all tasks share, run on every rank."""

import contextlib
import shutil
import sys
import time
from dataclasses import asdict

import torch
from rich.console import Console
from transformers.utils import logging

from inplace_ttt.config import Parallel, UserError
from inplace_ttt.evaluation.answering_task import AnsweringTask
from inplace_ttt.evaluation.arguments import Arguments
from inplace_ttt.evaluation.columns import EvaluatedModel, columns_of
from inplace_ttt.evaluation.harness_task import HarnessTask
from inplace_ttt.evaluation.kinds import KINDS
from inplace_ttt.evaluation.models import EXPORTED, chosen_dtype
from inplace_ttt.evaluation.reading_task import ReadingTask
from inplace_ttt.evaluation.results import Results
from inplace_ttt.evaluation.task import Task
from inplace_ttt.job import Job
from inplace_ttt.megatron import runtime
from inplace_ttt.packages import version
from inplace_ttt.resilience.lock import lock_beside

TASKS: dict[str, type[Task]] = {
    "position": ReadingTask,
    "final-block": ReadingTask,
    "ruler": AnsweringTask,
    "needle": AnsweringTask,
    "harness": HarnessTask,
}


def evaluate(arguments: Arguments, job: Job) -> int:
    """Measure the samples that the output folder does not have yet; write tables and figures on rank 0.

    Returns the exit code 0. Raises UserError if the arguments, the models or the output folder are invalid.
    """
    dtype = chosen_dtype(arguments.options.dtype)
    logging.set_verbosity_error()  # hide tokenizer warnings of transformers, one per rank
    asked = columns_of(arguments.models, arguments.modes, _numerics(arguments, dtype))
    _check_keys(arguments, asked)
    task = TASKS[arguments.task](arguments, asked, job.world)
    job.start(Parallel(timeout_minutes=arguments.timeout_minutes), 0)
    results = Results(arguments.output, job.world.rank, arguments.task)
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(lock_beside(arguments.output, f"--output {arguments.output}"))
            results.claim(arguments.task, task.settings, [one.column for one in asked])

        runtime.on_first_rank(claim)
        try:
            results.open()
            runtime.raise_on_all_ranks(None)  # barrier: no rank writes before all ranks have read
            task.prepare(job)
            task.run(results, job, runtime.device(), dtype)
        except UserError:
            results.close()
            if job.world.rank == 0:
                shutil.rmtree(arguments.output / EXPORTED, ignore_errors=True)
                results.unclaim()
            raise
        results.close()
        runtime.raise_on_all_ranks(None)
        if job.world.rank == 0:
            job.watchdog.set_phase("writing the results")
            _report(task, arguments, asked, results, dtype)
    return 0


def _numerics(arguments: Arguments, dtype: torch.dtype) -> list[str]:
    """Return the settings of the command line that change results numerically, such as the dtype."""
    keys = ("train.precision", "model.transformer_impl", "ttt.comm_dtype")
    return [str(dtype), *(f"{key}={arguments.overrides[key]}" for key in keys if key in arguments.overrides)]


def _check_keys(arguments: Arguments, asked: list[EvaluatedModel]) -> None:
    """Raise UserError if a key=value is given that applies to no model of the command."""
    folder = next((one.model.path for one in asked if one.model.checkpoint is None), None)
    keys = [key for key in arguments.overrides if key not in ("parallel.timeout_minutes", "train.eval_positions")]
    if keys and not (TASKS[arguments.task].takes_layouts and any(one.model.checkpoint for one in asked)):
        key = keys[0]
        why = f"'{folder}' is in Hugging Face format" if folder else f"{arguments.task} exports checkpoints first"
        raise UserError(f"{key} applies only to training checkpoints, but {why}: leave it out")


def _report(
    task: Task, arguments: Arguments, asked: list[EvaluatedModel], results: Results, dtype: torch.dtype
) -> None:
    results.open()
    tables = task.scores(results)
    results.finish(
        dict(
            task=arguments.task,
            settings=task.settings,
            command=arguments.words,
            keys={key: str(value) for key, value in arguments.overrides.items()},
            dtype=str(dtype).removeprefix("torch."),
            date=time.strftime("%F %T %z"),
            versions={name: version(name) for name in ("inplace_ttt", "torch", "transformers")},
            columns=[asdict(one.column) for one in asked],
            scores=[record for table in tables for record in table.records()],
        )
    )
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else 160)
    for table in tables:
        table.show(console)
    pictures = [path for table in tables for path in KINDS[arguments.task].draw(table, arguments.output)]
    shutil.rmtree(arguments.output / EXPORTED, ignore_errors=True)
    written = ", ".join(["results.json", "samples.jsonl", *(path.name for path in pictures)])
    print(f"done: '{arguments.output}' contains {written}", flush=True)
