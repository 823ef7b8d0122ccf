"""Needles in a haystack: sentences that give a key one or more values, hidden in essays, noise or other needles."""

import uuid
from dataclasses import dataclass
from random import Random

from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * place / 39) for place in range(40)]  # per cent of the haystack
ESSAY_STEP, LINE_STEP, SHORT_STEP = 500, 25, 5  # words, lines, lines below 4096 tokens
SHORT = 4096


@dataclass(frozen=True)
class Needles:
    """A retrieval task; see ``Task``."""

    name: str
    sources: Sources
    haystack: str  # essay, noise or needle
    key_kind: str = "words"  # words or uuids
    value_kind: str = "numbers"  # numbers or uuids
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1

    new_tokens = 128
    any_answer = False

    def step(self, length: int) -> int:
        """See ``Task.step``: words of essays, or lines."""
        if self.haystack == "essay":
            return ESSAY_STEP
        return SHORT_STEP if length < SHORT else LINE_STEP

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """See ``Task.draft``."""
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
            kind = kind[:-1]  # of one
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
            places = sorted(len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
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
        for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
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
