"""Question answering over documents, of which most have nothing to do with the question."""

from dataclasses import dataclass
from random import Random

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft

ONLY = "Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class QuestionAnswering:
    """See ``Task``; the size is the number of documents. Sample i asks question i of the data set."""

    name: str
    sources: Sources
    data: str  # squad or hotpotqa

    new_tokens = 32
    any_answer = True

    def step(self, length: int) -> int:
        """See ``Task.step``."""
        return 10

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """See ``Task.draft``."""
        questions, documents = getattr(self.sources, self.data)
        if index >= len(questions):
            raise UserError(f"{self.name} has {len(questions)} questions, not {index + 1}: ask for fewer samples")
        question = questions[index]
        chosen = list(question.documents)
        missing = size - len(chosen)
        if missing <= len(question.related):
            chosen += rng.sample(question.related, max(0, missing))
        else:
            own = {*chosen, *question.related}
            chosen += question.related
            others = [number for number in range(len(documents)) if number not in own]
            chosen += rng.sample(others, min(size - len(chosen), len(others)))
        texts = [documents[number] for number in chosen]
        while len(texts) < size:  # all there are, once more
            texts += documents[: size - len(texts)]
        rng.shuffle(texts)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
        prompt = (
            f"Answer the question based on the given documents. {ONLY}\n\n"
            f"The following are given documents.\n\n{context}\n\n"
            f"Answer the question based on the given documents. {ONLY}\n\nQuestion: {question.text}"
        )
        return Draft(prompt, " Answer:", question.answers)
