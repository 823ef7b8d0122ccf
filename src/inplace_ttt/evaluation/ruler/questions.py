"""Ask questions about documents, most of which are unrelated to the question."""

from dataclasses import dataclass
from random import Random

from inplace_ttt.config import UserError
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Draft

ONLY = "Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class QuestionAnswering:
    """Describe a question answering task; see ``Task``. The size is the number of documents.

    Sample i uses question i of the data set.
    """

    name: str
    sources: Sources
    data: str  # squad or hotpotqa

    new_tokens = 32
    any_answer = True

    def step(self, length: int) -> int:
        """Return the step in documents. See ``Task.step``."""
        return 10

    def draft(self, rng: Random, size: int, index: int, length: int) -> Draft:
        """Build a sample. See ``Task.draft``. Raises UserError if the data set has no question ``index``."""
        questions, documents = getattr(self.sources, self.data)
        if index >= len(questions):
            raise UserError(f"{self.name} has {len(questions)} questions, but {index + 1} are needed: lower --samples")
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
        while len(texts) < size:  # repeat documents if the data set is too small
            texts += documents[: size - len(texts)]
        rng.shuffle(texts)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
        prompt = (
            f"Answer the question based on the given documents. {ONLY}\n\n"
            f"The following are given documents.\n\n{context}\n\n"
            f"Answer the question based on the given documents. {ONLY}\n\nQuestion: {question.text}"
        )
        return Draft(prompt, " Answer:", question.answers)
