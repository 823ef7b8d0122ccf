"""Generate RULER (Hsieh et al., arXiv 2404.06654): thirteen synthetic tasks over contexts of any length."""

from collections.abc import Callable

from inplace_ttt.evaluation.ruler.needles import Needles
from inplace_ttt.evaluation.ruler.questions import QuestionAnswering
from inplace_ttt.evaluation.ruler.sources import Sources
from inplace_ttt.evaluation.ruler.task import Task
from inplace_ttt.evaluation.ruler.variables import VariableTracking
from inplace_ttt.evaluation.ruler.words import CommonWords, FrequentWords

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)


def make_tasks(sources: Sources, count_tokens: Callable[[str], int], seed: int) -> dict[str, Task]:
    """Return all tasks by name, with the parameters of the paper.

    Args:
        count_tokens: returns the number of tokens of a text with the model's tokenizer.
        seed: seed of the worked example in variable tracking.
    """
    found = [
        Needles("niah_single_1", sources, "noise"),
        Needles("niah_single_2", sources, "essay"),
        Needles("niah_single_3", sources, "essay", value_kind="uuids"),
        Needles("niah_multikey_1", sources, "essay", keys=4),
        Needles("niah_multikey_2", sources, "needle"),
        Needles("niah_multikey_3", sources, "needle", key_kind="uuids", value_kind="uuids"),
        Needles("niah_multivalue", sources, "essay", values=4),
        Needles("niah_multiquery", sources, "essay", keys=4, queries=4),
        VariableTracking(count_tokens, seed),
        CommonWords(sources),
        FrequentWords(),
        QuestionAnswering("qa_1", sources, "squad"),
        QuestionAnswering("qa_2", sources, "hotpotqa"),
    ]
    return {task.name: task for task in found}
