"""Ask to track variables: find all variables of a chain of assignments that is hidden in noise."""

import itertools
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random

from inplace_ttt.evaluation.ruler.needles import NOISE, SHORT
from inplace_ttt.evaluation.ruler.task import Draft

HOPS = 4  # assignments after the first
EXAMPLE_TOKENS = 500  # maximum tokens of the worked example before the question
EXAMPLE_STEP = 5  # minimum noise lines of the worked example


@dataclass(frozen=True)
class VariableTracking:
    """Describe the variable tracking task; see ``Task``. The size is the number of noise lines."""

    count_tokens: Callable[[str], int]  # returns the number of tokens of a text, to fit the worked example
    seed: int
    name: str = "vt"

    new_tokens = 30
    any_answer = False

    def step(self, length: int) -> int:
        """Return the step in lines. See ``Task.step``."""
        return 5 if length < SHORT else 10

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample. See ``Task.draft``."""
        example = _problem(rng, self._example_size, letters=3, places=Random(f"{self.seed} example"))
        solved = example.prompt + example.answer_prefix + " " + " ".join(example.answers)
        problem = _problem(rng, size, letters=5, places=rng)
        return Draft(f"{solved}\n\n{problem.prompt}", problem.answer_prefix, problem.answers)

    @cached_property
    def _example_size(self) -> int:
        """Return the largest number of noise lines for which the worked example fits in ``EXAMPLE_TOKENS``."""
        size = EXAMPLE_STEP
        while True:
            draft = _problem(Random(self.seed), size + 1, letters=3, places=Random(f"{self.seed} example"))
            if self.count_tokens(draft.prompt + draft.answer_prefix) > EXAMPLE_TOKENS:
                return size
            size += 1


def _problem(rng: Random, size: int, *, letters: int, places: Random) -> Draft:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    lines = [NOISE] * size
    for number, place in enumerate(sorted(places.sample(range(size), len(chain)))):
        lines.insert(place + number, chain[number])
    context = "\n".join(lines)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )
    prefix = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {HOPS + 1} variables are "
        f"assigned the value {value}, they are: "
    )
    return Draft(prompt, prefix, tuple(names))
