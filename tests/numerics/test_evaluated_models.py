"""Models for evaluation: checkpoints, exported folders, folders of transformers; no code in them runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_models
from exported_models import build, texts
from inplace_ttt.config import UserError
from inplace_ttt.evaluation.columns import columns_of
from inplace_ttt.evaluation.generation import Prompt, answer
from inplace_ttt.evaluation.mode import FastWeightMode
from inplace_ttt.evaluation.models import ModelSource, open_model
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.hf.tokenizer import train_tokenizer

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
    named = ModelSource.find(path)
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
    with pytest.raises(UserError, match="is not a folder"):
        ModelSource.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no model"):
        ModelSource.find(tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="cannot be loaded by transformers"):
        open_model(ModelSource.find(tmp_path / "empty").export(tmp_path), "empty", ON, CPU, torch.float32)


def test_digests_tell_models_apart(folders):
    names, modes, dtypes = ("exported", "checkpoint"), (ON, OFF), (["float32"], ["bfloat16"])
    digests = [ModelSource.find(folders[name]).digest(m, d) for name in names for m in modes for d in dtypes]
    assert len(set(digests)) == 8 and ModelSource.find(folders["exported"]).digest(ON, ["float32"]) in digests


def changed(folder: Path, target: Path, gone: tuple[str, ...] = (), **keys) -> Path:
    """Copy a folder with other keys in its config.json, and without some."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | keys
    config = {key: value for key, value in config.items() if key not in gone}
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_fast_weights_are_on_where_a_configuration_does_not_say(folders, tmp_path):
    """Keep the class's default, and switch them off where that is asked for."""
    folder = changed(folders["exported"], tmp_path / "silent", gone=("ttt_mode",))
    assert ModelSource.find(folder).has_fast_weights
    torch.testing.assert_close(logits(folder, OFF, tmp_path), logits(folders["exported"], OFF, tmp_path))
    torch.testing.assert_close(logits(folder, ON, tmp_path), logits(folders["exported"], ON, tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(ttt_mode="false"), "sets ttt_mode='false'"),
        (dict(ttt_target="nosuch"), "has ttt_target='nosuch'"),
        (dict(ttt_chunk=0), "has ttt_chunk=0"),
        (dict(ttt_chunk="x"), "has ttt_chunk='x'"),
        (dict(ttt_lr=float("nan")), "has ttt_lr=nan"),
        (dict(ttt_lr=1e308), "has ttt_lr=1e"),
        (dict(ttt_clip=-1), "has ttt_clip=-1"),
        (dict(ttt_clip=[1, 2, 3]), r"has ttt_clip=\[1, 2, 3\]"),
        (dict(num_hidden_layers=10**9), "use at most 10000"),
        (dict(hidden_act="nosuch"), r"cannot be loaded by transformers \(KeyError: 'nosuch'\)"),
        (dict(intermediate_size=120), "has the wrong shape of model.layers"),
        (dict(rope_parameters=[1]), "config.json' cannot be read by transformers"),
    ],
)
def test_configurations_that_cannot_be(folders, tmp_path, keys, message):
    folder = changed(folders["exported"], tmp_path / "odd", **keys)
    with pytest.raises(UserError, match=message):
        named = ModelSource.find(folder)
        open_model(named.path, "odd", ON, CPU, torch.float32)


def test_layers_that_are_left_over(folders, tmp_path):
    folder = changed(folders["plain"], tmp_path / "fewer", num_hidden_layers=1)
    with pytest.raises(UserError, match="that the model in its config"):
        open_model(folder, "fewer", ON, CPU, torch.float32)


def test_an_index_that_leads_out_of_its_folder(folders, tmp_path):
    folder = changed(folders["plain"], tmp_path / "index")
    index = dict(weight_map={"model.norm.weight": "../plain/model.safetensors"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a file name in its folder"):
        open_model(folder, "index", ON, CPU, torch.float32)


def test_answers_are_greedy_whatever_a_folder_asks_for(folders, tmp_path):
    """Penalties, beams and sampling of generation_config.json are no part of an evaluation; ends of texts are."""
    folder = changed(folders["plain"], tmp_path / "asks")
    asks = dict(do_sample=True, num_beams=3, repetition_penalty=9.0, suppress_tokens=[1, 2], eos_token_id=[7])
    (folder / "generation_config.json").write_text(json.dumps(asks))
    network = open_model(folder, "asks", ON, CPU, torch.float32).network
    plain = open_model(folders["plain"], "plain", ON, CPU, torch.float32).network
    assert network.generation_config.eos_token_id == [7]
    network.generation_config.eos_token_id = plain.generation_config.eos_token_id = None
    found, expected = (one.generate(texts(1, 20), max_new_tokens=20) for one in (network, plain))
    assert torch.equal(found, expected)
    for ends in ("abc", [[1]], -1):
        (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ends)))
        with pytest.raises(UserError, match="eos_token_id"):
            open_model(folder, "asks", ON, CPU, torch.float32)


def test_numbers_that_are_not_finite(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = changed(folders["plain"], tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata=dict(format="pt"))
    model = open_model(folder, "nan", ON, CPU, torch.float32)
    with pytest.raises(UserError, match="the logits of 'nan' are not finite"):
        answer(model, [Prompt(0, (1, 2, 3), 4)])
    with pytest.raises(UserError, match="produces token ID 5000, but the model has 300 embedding rows"):
        answer(model, [Prompt(0, (1, 5000), 4)])


def test_results_in_a_models_folder_do_not_make_it_another(folders, tmp_path):
    folder = changed(folders["plain"], tmp_path / "model")
    before = ModelSource.find(folder).digest(ON)
    (folder / "eval").mkdir()
    (folder / "eval/results.json").write_text("{}")
    assert ModelSource.find(folder).digest(ON) == before


def test_a_plain_model_with_layers_of_fast_weights_has_none(tmp_path):
    """Keys of fast weights in the configuration of a plain class have no effect, whatever they are."""
    keys = dict(hf_models.SMALL, model_type="qwen3", architectures=["Qwen3ForCausalLM"], ttt_layers=[0])
    for more in ({}, dict(ttt_mode="x"), dict(ttt_mode=False)):
        (tmp_path / "config.json").write_text(json.dumps(keys | more))
        assert ModelSource.find(tmp_path).has_fast_weights is False
