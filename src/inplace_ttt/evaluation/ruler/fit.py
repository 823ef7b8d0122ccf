"""Samples of a task that fit a length: the haystack is as large as prompt and answer together allow."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler.task import Draft, Task

# A sample that is too long is made again with a haystack that is one step smaller. From FINE_FROM tokens on its size is
# chosen anew until the sample fills FULL of the length: documents differ in length, and steps of some tasks are large.
FINE_FROM, FULL = 16384, 0.975
LEAST = 5  # parts of a haystack: needles lie between them
ATTEMPTS = 20
GROWTH = 4  # words or lines of a haystack for which a tokenizer makes one token at the least
NEAR = 200  # a share of the size by which a guess is made larger, to find a size that does not fit


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers."""

    task: str
    index: int
    prompt: str  # rendered, with the answer's prefix at its end
    answers: tuple[str, ...]
    tokens: int  # of the prompt
    new_tokens: int
    any_answer: bool

    @property
    def digest(self) -> str:
        """Return a hash of the prompt."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


class Fitter:
    """Make samples of one task, length and tokenizer.

    Args:
        render: turns a draft into the prompt, by the chat template or without.
        count_tokens: of a prompt.
        size: of the haystack, as another fitter of the same kind has found it.
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
        """Find the largest haystack whose first sample fits, as NVIDIA's generator does: by interpolation, which makes
        fewer samples than bisection."""
        low = self.task.step(self.length)
        tokens = self._make(0, low).tokens
        if tokens > self.room:
            raise self._too_short(0, low)
        if GROWTH * tokens < low:
            raise UserError(
                f"{self.task.name} at {self.length}: the tokenizer makes {tokens} tokens of {low} words or lines: use "
                f"a model with a tokenizer of its own"
            )
        high = None  # the smallest size that is known not to fit
        while high is None or high - low > 1:
            guess = int(low * self.room / tokens)  # the longer a sample, the nearer is this
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

    def _make(self, index: int, size: int) -> Sample:
        task = self.task
        draft = task.draft(Random(f"{self.seed} {task.name} {self.length} {index}"), size, index, self.length)
        prompt = self.render(draft)
        return Sample(
            task.name, index, prompt, draft.answers, self.count_tokens(prompt), task.new_tokens, task.any_answer
        )

    def _too_short(self, index: int, size: int) -> UserError:
        needed = self._make(index, size).tokens + self.task.new_tokens
        return UserError(f"--lengths {self.length} is too short for {self.task.name}, which needs {needed} tokens")

    def sample(self, index: int) -> Sample:
        """Return sample ``index``, which does not depend on how many there are."""
        size, step, best = self.size, self.task.step(self.length), None
        for _ in range(ATTEMPTS):
            sample = self._make(index, size)
            if sample.tokens <= self.room:
                if best is None or sample.tokens > best.tokens:
                    best = sample
                if self.length < FINE_FROM or sample.tokens >= FULL * self.room:
                    return best
            if self.length >= FINE_FROM:
                size = max(step, int(size * (1 + FULL) / 2 * self.room / sample.tokens))
            elif size - step >= LEAST:
                size -= step
            else:
                break
        if best is None:
            raise self._too_short(index, size)
        return best

    def samples(self, count: int) -> Iterator[Sample]:
        """Yield the first samples."""
        for index in range(count):
            yield self.sample(index)
