"""Make samples of a task that fit a length: the largest haystack for which prompt plus answer fit."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler.task import Draft, Task

# A sample that is too long is generated again with a haystack that is one step smaller. From FINE_FROM tokens on the
# size is adjusted until the sample fills at least the fraction FULL of the length, because documents differ in length
# and some tasks have large steps.
FINE_FROM, FULL = 16384, 0.975
MIN_HAYSTACK_PARTS = 5  # minimum parts of a haystack; needles are inserted between parts
DRAWS = 20  # maximum random draws of the haystack's parts to reach FULL
GROWTH = 4  # maximum words or lines per token; a tokenizer with fewer tokens is rejected
NEAR = 200  # an estimated size grows by 1 / NEAR of itself, to find a size that does not fit


@dataclass(frozen=True)
class Sample:
    """Hold a prompt and its reference answers."""

    task: str
    index: int  # index of the sample in the task
    prompt: str  # rendered prompt, ends with the answer prefix
    answers: tuple[str, ...]
    tokens: int  # number of prompt tokens
    new_tokens: int  # tokens to generate
    any_answer: bool  # one answer suffices

    @property
    def digest(self) -> str:
        """Return a hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


class Fitter:
    """Generate samples of one task, length and tokenizer.

    Args:
        length: maximum tokens of prompt plus answer.
        render: returns the prompt of a draft, with or without the chat template.
        count_tokens: returns the number of tokens of a prompt.
        size: haystack size found by another fitter with the same arguments; None: determine it.

    Raises UserError if the smallest haystack does not fit, or the tokenizer is unusable.
    """

    def __init__(
        self,
        task: Task,
        length: int,
        seed: int,
        render: Callable[[Draft], str],
        count_tokens: Callable[[str], int],
        size: int | None = None,
    ):
        self.task, self.length, self.seed = task, length, seed
        self.render, self.count_tokens = render, count_tokens
        self.room = length - task.new_tokens
        self.size = self._largest_size() if size is None else size

    def _largest_size(self) -> int:
        """Return the largest haystack size whose first sample fits, as NVIDIA's generator does.

        Uses interpolation, which needs fewer samples than bisection.
        """
        low = self.task.step(self.length)
        tokens = self._make(0, low).tokens
        while tokens > self.room:
            if low <= MIN_HAYSTACK_PARTS:
                raise self._too_short(0, low)
            low = self._smaller(low)
            tokens = self._make(0, low).tokens
        if low < self.task.step(self.length):
            return low
        if GROWTH * tokens < low:
            raise UserError(
                f"{self.task.name} at {self.length}: the tokenizer produces {tokens} tokens for {low} words or lines: "
                f"use a model with a working tokenizer"
            )
        high = None  # smallest size known not to fit
        while high is None or high - low > 1:
            guess = int(low * self.room / tokens)  # more accurate for longer samples
            if high is None:
                guess = max(guess, low + 1) + low // NEAR
            elif not low < guess < high - (high - low) // 4:
                guess = (low + high) // 2
            made = self._make(0, guess).tokens
            if made <= self.room:
                low, tokens = guess, made
            else:
                high = guess
        return low

    def _make(self, index: int, size: int, draw: int = 0) -> Sample:
        task, again = self.task, f" {draw}" if draw else ""
        draft = task.draft(Random(f"{self.seed} {task.name} {self.length} {index}{again}"), size, index, self.length)
        prompt = self.render(draft)
        return Sample(
            task.name, index, prompt, draft.answers, self.count_tokens(prompt), task.new_tokens, task.any_answer
        )

    def _too_short(self, index: int, size: int) -> UserError:
        needed = self._make(index, size).tokens + self.task.new_tokens
        return UserError(
            f"--lengths {self.length} is too short for {self.task.name}: its sample {index} needs {needed} tokens"
        )

    def _smaller(self, size: int) -> int:
        """Return the next smaller size: one step less, or a tenth of a step near the minimum."""
        step = self.task.step(self.length)
        return size - step if size - step >= MIN_HAYSTACK_PARTS else max(MIN_HAYSTACK_PARTS, size - max(1, step // 10))

    def sample(self, index: int) -> Sample:
        """Return sample ``index``; it does not depend on the number of samples. Raises UserError if it cannot fit."""
        size, best = self.size, None
        if self.length < FINE_FROM:
            sample = self._make(index, size)
            while sample.tokens > self.room:
                if size <= MIN_HAYSTACK_PARTS:
                    raise self._too_short(index, size)
                size = self._smaller(size)
                sample = self._make(index, size)
            return sample
        for draw in range(DRAWS):
            for sample in self._fuller_and_fuller(index, draw):
                if sample.tokens <= self.room and (best is None or sample.tokens > best.tokens):
                    best = sample
            if best is not None and best.tokens >= FULL * self.room:
                return best
        if best is None:
            raise self._too_short(index, self.task.step(self.length))
        return best

    def _fuller_and_fuller(self, index: int, draw: int) -> Iterator[Sample]:
        """Yield the sample at sizes that approach the length, until it fills the length or no size is left."""
        step, size, below, above = self.task.step(self.length), self.size, 0, None
        while True:
            sample = self._make(index, size, draw)
            yield sample
            if FULL * self.room <= sample.tokens <= self.room:
                return
            if sample.tokens <= self.room:
                below = max(below, size)
            else:
                above = size if above is None else min(above, size)
            guess = max(step, int(size * (1 + FULL) / 2 * self.room / sample.tokens))
            if above is not None and not below < guess < above:
                guess = (below + above) // 2
            if guess in (below, above) or guess < step:
                return
            size = guess

    def samples(self, count: int) -> Iterator[Sample]:
        """Yield the first ``count`` samples."""
        for index in range(count):
            yield self.sample(index)
