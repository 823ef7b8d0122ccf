"""Define the interface of a task: what ``evaluate.py`` calls, in this order, on every rank."""

from typing import Protocol

import torch

from inplace_ttt.environment import World
from inplace_ttt.evaluation.arguments import Arguments
from inplace_ttt.evaluation.columns import EvaluatedModel
from inplace_ttt.evaluation.results import Results
from inplace_ttt.evaluation.scores import Scores
from inplace_ttt.job import Job


class Task(Protocol):
    """Measure samples of models, and make tables of them."""

    settings: dict  # settings of the samples; those in results.FIXED identify the evaluation
    takes_layouts: bool  # True: training checkpoints are evaluated in the layout of key=value; False: they are exported

    def __init__(self, arguments: Arguments, asked: list[EvaluatedModel], world: World):
        """Check as much as possible before ranks wait for each other, and set ``settings``.

        Raises UserError if the task does not fit the options or the models.
        """
        ...

    def prepare(self, job: Job) -> None:
        """Make the samples, and export checkpoints if the task needs that (collective)."""
        ...

    def run(self, results: Results, job: Job, device: torch.device, dtype: torch.dtype) -> None:
        """Measure the samples that ``results`` does not have; add each with ``Results.add`` (collective)."""
        ...

    def scores(self, results: Results) -> list[Scores]:
        """Return the tables of all samples. Only the first rank calls it; take each sample with ``Results.use``."""
        ...
