"""Ask to aggregate: find the most frequent words of a list."""

import math
import string
from dataclasses import dataclass
from random import Random

from inplace_ttt.evaluation.ruler.needles import SHORT
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft

COMMON = 10  # number of words to find


@dataclass(frozen=True)
class CommonWords:
    """Describe the task of a numbered list with ten frequent words; see ``Task``. The size counts distinct words."""

    sources: Sources
    name: str = "cwe"

    new_tokens = 120
    any_answer = False

    def step(self, length: int) -> int:
        """Return the step in words. See ``Task.step``."""
        return 10

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample. See ``Task.draft``."""
        # worked example: (distinct words, repeats of a frequent word, repeats of other words); question: the repeats
        example, often, seldom = ((20, 3, 1), 6, 1) if length < SHORT else ((40, 10, 3), 30, 3)
        solved_context, solved = self._list(rng, *example)
        context, answers = self._list(rng, size, often, seldom)
        shown = " ".join(f"{number}. {word}" for number, word in enumerate(solved, 1))
        prompt, prefix = self._ask(solved_context)
        question, _ = self._ask(context)
        return Draft(f"{prompt}{prefix} {shown}\n{question}", prefix, tuple(answers))

    def _list(self, rng: Random, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = rng.sample(self.sources.words(size), size)
        common = words[:COMMON]
        drawn = common * often + words[COMMON:] * seldom
        rng.shuffle(drawn)
        return " ".join(f"{number}. {word}" for number, word in enumerate(drawn, 1)), common

    @staticmethod
    def _ask(context: str) -> tuple[str, str]:
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
            " Answer: The top 10 words that appear most often in the list are:",
        )


@dataclass(frozen=True)
class FrequentWords:
    """Describe the task of coded words with zeta-distributed frequencies; see ``Task``. The size counts words."""

    name: str = "fwe"

    new_tokens = 50
    any_answer = False
    letters = 6

    def step(self, length: int) -> int:
        """Return the step in words of the coded text: one per 32 tokens of prompt, at least 1. See ``Task.step``."""
        return max(1, (length - self.new_tokens) // 32)

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample; the vocabulary has one word per 50 tokens of length. See ``Task.draft``."""
        vocabulary: list[str] = []
        known: set[str] = set()
        while len(vocabulary) < max(4, (length - self.new_tokens) // 50):
            word = "".join(rng.choices(string.ascii_lowercase, k=self.letters))
            if word not in known:
                known.add(word)
                vocabulary.append(word)
        vocabulary[0] = "..."  # the most frequent word is noise
        drawn = []
        for rank, word in enumerate(vocabulary, 1):
            drawn += [word] * int(size * rank**-2.0 / (math.pi**2 / 6))
        rng.shuffle(drawn)
        prompt = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(drawn)}\nQuestion: Do not provide any explanation. "
            "Please ignore the dots '....'. What are the three most frequently appeared words in the above coded text?"
        )
        prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return Draft(prompt, prefix, tuple(vocabulary[1:4]))
