"""Hide needles in a haystack: sentences that give a key one or more values, in essays, noise or other needles."""

import uuid
from dataclasses import dataclass
from random import Random

from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * place / 39) for place in range(40)]  # percent of the haystack before the needle
ESSAY_STEP, LINE_STEP, SHORT_STEP = 500, 25, 5  # step in words, in lines, and in lines below SHORT tokens
FINE_STEP = 50  # step in words for needles at a given depth
SHORT = 4096  # lengths in tokens below this use smaller steps


@dataclass(frozen=True)
class Needles:
    """Describe a needle retrieval task; see ``Task``. The size is the number of words (essay) or lines."""

    name: str
    sources: Sources
    haystack: str  # essay, noise or needle
    key_kind: str = "words"  # words or uuids
    value_kind: str = "numbers"  # numbers or uuids
    keys: int = 1
    values: int = 1  # values per key
    queries: int = 1  # keys in the question
    depth: float | None = None  # percent of the haystack before the needle; None: random

    new_tokens = 128
    any_answer = False

    def step(self, length: int) -> int:
        """Return the step in words of essays, or in lines. See ``Task.step``."""
        if self.haystack == "essay":
            return ESSAY_STEP if self.depth is None else FINE_STEP
        return SHORT_STEP if length < SHORT else LINE_STEP

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample. See ``Task.draft``."""
        keys = [self._random(self.key_kind, rng) for _ in range(self.keys)]
        values = [[self._random(self.value_kind, rng) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(key, value) for key, own in zip(keys, values, strict=True) for value in own]
        rng.shuffle(needles)
        context = self._hide(needles, size, rng)
        asked = rng.sample(range(self.keys), self.queries)
        names = [keys[number] for number in asked]
        query = names[0] if len(names) == 1 else ", ".join(names[:-1]) + ", and " + names[-1]
        answers = tuple(value for number in asked for value in values[number])
        kind = self.value_kind
        if self.queries * self.values == 1:
            kind = kind[:-1]  # singular
            some, are, are_all = "A", "is", "is"
        else:
            some, are, are_all = "Some", "are", "are all"
        prompt = (
            f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{context}\n"
            f"What {are_all} the special magic {kind} for {query} mentioned in the provided text?"
        )
        return Draft(prompt, f" The special magic {kind} for {query} mentioned in the provided text {are}", answers)

    def _hide(self, needles: list[str], size: int, rng: Random) -> str:
        if self.haystack == "essay":
            sentences = self.sources.essay_sentences(size)
            depths = rng.sample(DEPTHS, len(needles)) if self.depth is None else [self.depth]
            places = sorted(int(len(sentences) * depth / 100) for depth in depths)
            parts, before = [], 0
            for place, needle in zip(places, needles, strict=True):
                parts += [" ".join(sentences[before:place]), needle]
                before = place
            return " ".join([*parts, " ".join(sentences[before:])])
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                self._needle(self._random(self.key_kind, rng), self._random(self.value_kind, rng)) for _ in range(size)
            ]
        places = rng.sample(range(size), len(needles)) if self.depth is None else [round(size * self.depth / 100)]
        for place, needle in zip(sorted(places, reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    def _random(self, kind: str, rng: Random) -> str:
        if kind == "numbers":
            return str(rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))
        return f"{rng.choice(self.sources.adjectives)}-{rng.choice(self.sources.nouns)}"


def depth_task(haystack: str, depth: float) -> str:
    """Return the name of the task with one needle at a depth in percent."""
    return f"needle_{haystack}_{depth:g}"


def needle_at_depth(name: str, sources: Sources) -> Needles:
    """Return the task for a name from ``depth_task``: one needle with a number as its value."""
    _, haystack, depth = name.split("_")
    return Needles(name, sources, haystack, depth=float(depth))
