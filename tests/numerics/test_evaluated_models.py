"""Models for evaluation: checkpoints, exported folders, folders of transformers; no code in them runs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from inplace_ttt.config import UserError
from inplace_ttt.data.tokenizer import train_tokenizer
from inplace_ttt.evaluation.columns import columns_of
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import Named, open_model
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from numerics.test_exported_model import build, texts

CPU = torch.device("cpu")
ON, OFF = FastWeightMode(), FastWeightMode(on=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """An exported folder, the checkpoint that it is of, and a plain Llama with code that it wants to run."""
    base = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["some words " * 50], 300)
    build("qwen3").save_pretrained(base / "theirs")
    tokenizer.save_pretrained(base / "theirs")
    import_checkpoint(base / "theirs", base / "checkpoint")
    export_checkpoint(base / "checkpoint", base / "exported")
    plain = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(plain).save_pretrained(base / "plain")
    tokenizer.save_pretrained(base / "plain")
    config = json.loads((base / "plain/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (base / "plain/config.json").write_text(json.dumps(config))
    (base / "plain/evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nEvil = None\n")
    code = base / "exported/modeling_inplace_ttt.py"
    code.write_text(f"open({str(base / 'ran')!r}, 'w')\n" + code.read_text())
    return {name: base / name for name in ("checkpoint", "exported", "plain", "ran")}


@torch.no_grad()
def logits(path, mode, work):
    named = Named.find(path)
    (mode,) = named.modes([mode])
    model = open_model(named.export(work), path.name, mode, CPU, torch.float32)
    assert model.name == path.name and model.tokenizer("words").input_ids
    return model.network(texts(1, 60)).logits


def test_fast_weights_on_off_and_clipped(folders, tmp_path):
    on, off = (logits(folders["exported"], mode, tmp_path) for mode in (ON, OFF))
    expected = build("qwen3")
    with torch.no_grad():
        torch.testing.assert_close(on, expected(texts(1, 60)).logits)
        for mlp in expected.fast_mlps:
            mlp.eta = 0.0
        torch.testing.assert_close(off, expected(texts(1, 60)).logits)
    clipped = logits(folders["exported"], FastWeightMode.parse("clip=0.01"), tmp_path)
    assert not torch.allclose(clipped, on) and not torch.allclose(clipped, off)
    assert not folders["ran"].exists()


def test_a_checkpoint_is_exported_once(folders, tmp_path):
    first = logits(folders["checkpoint"], ON, tmp_path / "work")
    torch.testing.assert_close(first, logits(folders["exported"], ON, tmp_path))
    (made,) = (tmp_path / "work").glob("*/config.json")
    before = made.stat().st_mtime_ns
    logits(folders["checkpoint"], OFF, tmp_path / "work")
    assert made.stat().st_mtime_ns == before and list((tmp_path / "work").glob("*/config.json")) == [made]


def test_a_plain_model_runs_without_its_code(folders, tmp_path):
    on, off = (logits(folders["plain"], mode, tmp_path) for mode in (ON, OFF))
    assert torch.equal(on, off) and not folders["ran"].exists()
    clipped = FastWeightMode.parse("clip=0.1")
    with pytest.raises(UserError, match=r"--fast-weights clip=0\.1: .* has no fast weights to clip"):
        columns_of([folders["plain"]], [clipped], [])
    both = columns_of([folders["plain"], folders["exported"]], [ON, clipped], [])
    assert [one.column.label for one in both] == ["plain", "exported", "exported (clip=0.1)"]


@pytest.mark.parametrize("word", ["", "yes", "clip", "clip=", "clip=x", "clip=0", "clip=-1", "clip=inf", "clip=nan"])
def test_modes_that_are_none(word):
    with pytest.raises(UserError, match="use on, off, clip=none or clip=NUMBER"):
        FastWeightMode.parse(word)


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        Named.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no model"):
        Named.find(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        open_model(Named.find(tmp_path / "empty").export(tmp_path), "empty", ON, CPU, torch.float32)


def test_digests_tell_models_apart(folders):
    names, modes, dtypes = ("exported", "checkpoint"), (ON, OFF), (["float32"], ["bfloat16"])
    digests = [Named.find(folders[name]).digest(m, d) for name in names for m in modes for d in dtypes]
    assert len(set(digests)) == 8 and Named.find(folders["exported"]).digest(ON, ["float32"]) in digests
