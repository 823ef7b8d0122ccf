"""Models from Hugging Face compute what transformers computes, and come back bit for bit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from hf_models import SMALL, our_logits, weights
from inplace_ttt import models
from inplace_ttt.config import TTT, Config, UserError
from inplace_ttt.hf.config import check_exportable, read_model, write_config
from inplace_ttt.hf.convert import export_checkpoint, import_checkpoint
from inplace_ttt.resilience.checksums import write_manifest
from inplace_ttt.training.compose import compose_config, to_config
from launching import ROOT, run_launch_script
from ranks import run_ranks

YARN = [f"model.rope_scaling.{key}" for key in ("rope_type=yarn", "factor=4.0", "original_max_position_embeddings=64")]
FAMILIES = {
    "qwen3 tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=False),
    "llama 3": LlamaConfig(
        **SMALL,
        tie_word_embeddings=False,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "smollm2": LlamaConfig(
        **SMALL, tie_word_embeddings=True, rope_parameters=dict(rope_theta=1e5, rope_type="default")
    ),
    "qwen3 window": Qwen3Config(
        **SMALL, head_dim=16, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "qwen3 windows": Qwen3Config(
        **SMALL,
        head_dim=16,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2 window": Qwen2Config(
        **SMALL, tie_word_embeddings=False, use_sliding_window=True, sliding_window=9, max_window_layers=0
    ),
    "qwen3 yarn": Qwen3Config(
        **SMALL,
        head_dim=16,
        rope_parameters=dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=64),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request, tmp_path_factory):
    """A folder that transformers wrote, in several shards, and the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param], dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.3)
        elif "bias" in name:
            parameter.data.normal_(0.0, 0.5)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder, max_shard_size="50KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder, model


@pytest.mark.parametrize(
    "sizes", [{}, dict(tensor_model_parallel_size=2), dict(pipeline_model_parallel_size=2)], ids=["1", "TP2", "PP2"]
)
def test_logits_equal_transformers(theirs, sizes, tmp_path):
    folder, model = theirs
    import_checkpoint(folder, tmp_path / "imported")
    text = torch.randint(0, 199, (120,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(text[None]).logits[0]
    found = run_ranks(2 if sizes else 1, our_logits, str(tmp_path / "imported"), text.tolist(), sizes)
    logits = torch.from_numpy(next(logits for logits in reversed(found) if logits is not None))
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_bit_identical(theirs, dtype, tmp_path):
    _, model = theirs
    model.to(dtype).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    (tmp_path / "theirs/tokenizer.json").write_text("{}")
    model.float()
    import_checkpoint(tmp_path / "theirs", tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "back")
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    text = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(again.to(dtype)(text).logits, model.to(dtype)(text).logits)
    model.float()
    assert (tmp_path / "back/tokenizer.json").is_file()


@pytest.mark.parametrize("name", models.FAMILIES)
def test_transformers_reads_what_is_exported(name):
    """Keys that an export leaves out have the defaults of the class, which may be a sliding window."""
    keys = [f"model.family={name}", "model.vocab_size=100", "model.max_position_embeddings=4096"]
    config = to_config(compose_config(["recipe=tiny_ttt", *keys], ROOT / "recipes"))
    model = config.model
    written = write_config(config, "bfloat16", base=None)
    kind = getattr(transformers, models.FAMILIES[name].config_class)
    resolved = kind.from_dict({key: value for key, value in written.items() if key != "model_type"})
    assert not getattr(resolved, "sliding_window", None)
    assert set(getattr(resolved, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    back = read_model(written, "config.json")
    assert vars(back) == vars(model) | dict(embedding_init_method_std=None)  # only training uses it


def test_missing_keys_have_the_defaults_of_the_class():
    keys = dict(hidden_size=256, num_attention_heads=64, num_hidden_layers=2, intermediate_size=80, vocab_size=199)
    assert read_model(keys | dict(model_type="qwen3"), "c").num_query_groups == Qwen3Config().num_key_value_heads
    assert read_model(keys | dict(model_type="qwen3", num_key_value_heads=8), "c").num_query_groups == 8
    assert read_model(keys | dict(model_type="llama"), "c").num_query_groups == 64


def refusal(folder, tmp_path):
    with pytest.raises(UserError) as caught:
        import_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "base", "expected"),
    [
        (["model.max_position_embeddings=64"], {}, 256),  # trained at more
        (["model.max_position_embeddings=1024"], {}, 1024),
        ([], {"max_position_embeddings": 512}, 512),
        ([], {"max_position_embeddings": 128}, 256),
        (["model.max_position_embeddings=512", *YARN], {}, 512),
        (["model.max_position_embeddings=128", *YARN], {}, 128),  # what its frequencies were computed of
    ],
)
def test_the_length_that_an_export_says(changes, base, expected):
    overrides = ["recipe=tiny_ttt", "data.seq_length=256", "model.vocab_size=100", *changes]
    config = to_config(compose_config(overrides, ROOT / "recipes"))
    assert write_config(config, "bfloat16", base)["max_position_embeddings"] == expected


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(FAMILIES["qwen3 tied"]).save_pretrained(folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def write(changed=None, **keys):
        save_file({**tensors, **(changed or {})}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **keys}))

    name = "model.layers.1.self_attn.q_proj"
    write({f"{name}.bias": torch.zeros(96)})
    assert f"'{name}.bias'" in refusal(folder, tmp_path) and "has an unknown tensor" in refusal(folder, tmp_path)
    write({f"{name}.weight": torch.zeros(8, 48)})
    assert f"{name}.weight has shape (8, 48)" in refusal(folder, tmp_path)
    write({"lm_head.weight": torch.zeros(199, 48)})
    assert "lm_head.weight differs from" in refusal(folder, tmp_path)
    write(num_hidden_layers=5)
    assert "model.layers.4." in refusal(folder, tmp_path)
    write(model_type="gpt2")
    assert "use one of qwen3, qwen2, llama" in refusal(folder, tmp_path)
    write(attention_bias=True)
    assert "attention_bias=True" in refusal(folder, tmp_path)
    write()
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20000)
    assert "is damaged" in refusal(folder, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "has neither" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    "keys, said",
    [
        (dict(hidden_size="abc"), "hidden_size='abc': it must be an integer from 1 to 10^9"),
        (dict(hidden_size=None), "hidden_size=None"),
        (dict(hidden_size=64), "model.embed_tokens.weight has shape (199, 48), but config.json gives (199, 64)"),
        (dict(intermediate_size=96), "mlp.gate_proj.weight has shape (80, 48), but config.json gives (96, 48)"),
        (dict(num_attention_heads=7), "model.num_query_groups=2 does not divide"),
        (dict(head_dim=15), "model.kv_channels=15 is odd"),
        (dict(vocab_size=True), "vocab_size=True"),
        (dict(rms_norm_eps=0), "rms_norm_eps=0: it must be a number above 0"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes': it must be true or false"),
        (dict(rope_parameters=[1]), "rope_parameters=[1]"),
        (dict(rope_parameters=dict(rope_type="longrope")), "rope_type=longrope is not known"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "needs model.rope_scaling.original_max_position"),
        (dict(rope_parameters=dict(rope_type="linear", factor="4x")), "factor='4x'"),
        (dict(rope_parameters=dict(rope_theta=-1.0)), "rope_theta=-1.0"),
        (dict(rope_parameters=dict(rope_type=["yarn"])), "rope_type"),
        (dict(rms_norm_eps=10**400), "it must be a number above 0"),
        (dict(model_type=["qwen3"]), "it must be a name such as qwen3"),
        (dict(ttt_mode="yes", ttt_layers=[0]), "ttt_mode='yes': it must be true or false"),
        (dict(ttt_mode=True, ttt_layers=[0], ttt_lr=10**400), "it must be a number"),
        (dict(ttt_mode=True, ttt_layers=[0], ttt_clip=-1), "ttt_clip=-1"),
        (dict(ttt_mode=True, ttt_layers="all"), "ttt_layers='all'"),
        (dict(ttt_mode=True, ttt_layers=[0], ttt_chunk=0), "ttt_chunk=0"),
        (dict(ttt_mode=True, ttt_layers=[0], ttt_target="hidden"), "ttt_target='hidden'"),
    ],
)
def test_configurations_that_cannot_be_are_refused_by_key(keys, said, tmp_path):
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(FAMILIES["qwen3 tied"]).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    assert said in refusal(folder, tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": null}}', "{"])
def test_damaged_indices_are_refused(content, tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["smollm2"]).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    (tmp_path / "model/model.safetensors.index.json").write_text(content)
    assert "index.json' " in refusal(tmp_path / "model", tmp_path)


def test_checkpoints_that_cannot_be_exported_are_refused(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["smollm2"]).save_pretrained(tmp_path / "model")
    import_checkpoint(tmp_path / "model", tmp_path / "imported")

    def refused():
        with pytest.raises(UserError) as caught:
            export_checkpoint(tmp_path / "imported", tmp_path / "out")
        return str(caught.value)

    config = tmp_path / "imported/hf/config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"intermediate_size": 80', '"intermediate_size": 96'))
    assert "linear_fc1.weight has shape (160, 48), but its configuration gives (192, 48)" in refused()
    config.write_text(json.dumps({**json.loads(kept), "partial_rotary_factor": 0.5}))
    write_manifest(tmp_path / "imported")
    assert "partial_rotary_factor=0.5" in refused()
    config.write_text(kept)
    (tmp_path / "imported/manifest.json").unlink()
    index = tmp_path / "imported/.metadata"
    index.write_bytes(b"x" * 100)
    write_manifest(tmp_path / "imported")  # as it would be after damage that no checksum knows of
    assert "imported' cannot be read: " in refused()
    with pytest.raises(UserError, match="is not a folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")


def test_other_update_rules_are_not_exported():
    check_exportable(Config(ttt=TTT()), "'run'")
    check_exportable(Config(ttt=TTT(enabled=False, decay=0.5)), "'run'")
    with pytest.raises(UserError, match=r"'run' was trained with ttt.decay=0.5: exported models and books have only"):
        check_exportable(Config(ttt=TTT(decay=0.5)), "'run'")


def test_commands(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["smollm2"]).save_pretrained(tmp_path / "model")

    assert run_launch_script("import_hf.py", tmp_path / "model", tmp_path / "imported").returncode == 0
    assert run_launch_script("export_hf.py", tmp_path / "imported", tmp_path / "back").returncode == 0
    done = run_launch_script("export_hf.py", tmp_path / "imported", tmp_path / "back")
    assert done.returncode == 2 and "already exists" in done.stderr and "Traceback" not in done.stderr
