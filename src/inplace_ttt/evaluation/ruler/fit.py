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
MIN_HAYSTACK_PARTS = 5  # parts of a haystack: needles lie between them
DRAWS = 20
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
        while tokens > self.room:
            if low <= MIN_HAYSTACK_PARTS:
                raise self._too_short(0, low)
            low = self._smaller(low)
            tokens = self._make(0, low).tokens
        if low < self.task.step(self.length):
            return low
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
            f"--lengths {self.length} is too short for {self.task.name}, whose sample {index} needs {needed} tokens"
        )

    def _smaller(self, size: int) -> int:
        """Return the next smaller size: by a step, and where there is no room for that by a tenth of one."""
        step = self.task.step(self.length)
        return size - step if size - step >= MIN_HAYSTACK_PARTS else max(MIN_HAYSTACK_PARTS, size - max(1, step // 10))

    def sample(self, index: int) -> Sample:
        """Return sample ``index``, which does not depend on how many there are."""
        size, best = self.size, None
        if self.length < FINE_FROM:
            sample = self._make(index, size)
            while sample.tokens > self.room:
                if size <= MIN_HAYSTACK_PARTS:
                    raise self._too_short(index, size)
                size = self._smaller(size)
                sample = self._make(index, size)
            return sample
        for draw in range(DRAWS):  # of the haystack's parts
            for sample in self._fuller_and_fuller(index, draw):
                if sample.tokens <= self.room and (best is None or sample.tokens > best.tokens):
                    best = sample
            if best is not None and best.tokens >= FULL * self.room:
                return best
        if best is None:
            raise self._too_short(index, self.task.step(self.length))
        return best

    def _fuller_and_fuller(self, index: int, draw: int) -> Iterator[Sample]:
        """Yield a sample at sizes that come nearer to the length, until it fills it or there are no more."""
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
        """Yield the first samples."""
        for index in range(count):
            yield self.sample(index)
