"""Define the interface of RULER's tasks: a task builds samples of a given haystack size."""

from dataclasses import dataclass
from random import Random
from typing import Protocol


@dataclass(frozen=True)
class Draft:
    """Hold a sample before it is rendered and its tokens are counted."""

    prompt: str  # question with its haystack
    answer_prefix: str  # beginning of the answer, which the model continues
    answers: tuple[str, ...]  # reference answers


class Task(Protocol):
    """Define a task of RULER (Hsieh et al., arXiv 2404.06654). The size of a haystack is its number of parts."""

    name: str
    new_tokens: int  # tokens to generate
    any_answer: bool  # True: one answer suffices; False: the score is the fraction of answers found

    def step(self, length: int) -> int:
        """Return the smallest usual haystack size, which is also the step by which a size is reduced.

        Args:
            length: tokens of prompt plus answer.
        """

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample.

        Args:
            rng: random generator of this sample only.
            size: haystack size.
            index: index of the sample in the task.
            length: tokens of prompt plus answer; some tasks choose their vocabulary size by it.
        """
