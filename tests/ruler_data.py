"""Small files in the place of RULER's own."""

import json
from pathlib import Path


def write_ruler_data(folder: Path) -> Path:
    """Write stand-ins for the essays, SQuAD and HotpotQA."""
    sentences = [f"Essay sentence number {n} says little, as Mr. Smith would." for n in range(700)]
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": "\n\n".join(sentences)}))
    articles = []
    for article in range(60):
        paragraphs = []
        for place in range(5):
            text = f"Paragraph {place} of article {article}. " + "Something happens in it. " * (10 + place)
            qas = [
                dict(
                    question=f"Which is {article}.{place}?",
                    is_impossible=False,
                    answers=[{"text": f"a{article}b{place}"}],
                ),
                dict(question="Which is not there?", is_impossible=True, answers=[]),
            ]
            paragraphs.append(dict(context=text, qas=qas))
        articles.append(dict(paragraphs=paragraphs))
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = []
    for number in range(80):
        context = [
            [f"Title {number}.{n}", [f"First of {number}.{n}.", " Second of it, somewhat longer."]] for n in range(10)
        ]
        hotpot.append(dict(question=f"Who is {number}?", answer=f"person {number}", context=context))
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return folder
