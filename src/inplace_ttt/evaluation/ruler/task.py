"""A task of RULER: how its samples are made at a given size."""

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """A sample before its length is known."""

    prompt: str  # what a user would ask
    answer_prefix: str  # the beginning of the answer, which the model continues
    answers: tuple[str, ...]


class Task(Protocol):
    """One of the thirteen tasks (Hsieh et al., arXiv 2404.06654). A size is the number of its haystack's parts."""

    name: str
    new_tokens: int  # to generate
    any_answer: bool  # one answer suffices; otherwise the score is the share of answers that are found

    def step(self, length: int) -> int:
        """Return the smallest size, which is also by how much a sample that is too long is made smaller."""

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Make a sample.

        Args:
            rng: of this sample alone.
            size: of the haystack.
            index: of the sample in the task.
            length: tokens of prompt and answer together, which some tasks' vocabularies depend on.
        """
