"""The examples in docstrings of what users call."""

import doctest
import re
import sys

import pytest
import torch
from transformers import StaticCache

from exported_models import build
from inplace_ttt.data.prepare import prepare
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.hf.modeling_inplace_ttt import FastWeightCache, InPlaceTTTQwen3ForCausalLM
from inplace_ttt.hf.tokenizer import train_tokenizer
from inplace_ttt.training import compose, sweep
from inplace_ttt.ttt import ChunkTargets, DecayedSum, bounded_fast_weight_linear, fast_weight_linear
from launching import ROOT

EXAMPLES = [
    fast_weight_linear,
    bounded_fast_weight_linear,
    ChunkTargets,
    DecayedSum,
    InPlaceTTTQwen3ForCausalLM.read,
    InPlaceTTTQwen3ForCausalLM.load_fast_weights,
    InPlaceTTTQwen3ForCausalLM.generate,
    FastWeightCache.fold,
    import_checkpoint,
    export_checkpoint,
    compose.compose_config,
    prepare,
    sweep.split_values,
    train_tokenizer,
]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """Give examples the names that their modules lack: a model, a folder with it, the recipes."""
    folder, model = tmp_path_factory.mktemp("examples"), build("qwen3")
    model.save_pretrained(folder / "theirs")
    import_checkpoint(folder / "theirs", folder / "imported")
    operation = dict(torch=torch, fast_weight_linear=fast_weight_linear)
    return dict(operation, StaticCache=StaticCache, model=model, folder=folder, recipes=ROOT / "recipes")


@pytest.mark.parametrize("called", EXAMPLES, ids=lambda called: called.__qualname__)
def test_example(called, names, capsys):
    own = vars(sys.modules[called.__module__])
    (example,) = doctest.DocTestFinder(recurse=False).find(called, called.__qualname__, globs={**own, **names})
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert not result.failed, capsys.readouterr().out


def test_the_operation_as_docs_show_it():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["out"].shape == names["x"].shape and len(names["first"]) == len(names["rest"]) == 512
