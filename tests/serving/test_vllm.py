"""vLLM with the plugin: the tokens of many requests over few slots are those of the exported model, fp32 on a CPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from inplace_ttt.hf import modeling_inplace_ttt as exported
from launching import ROOT

PYTHON = ROOT / ".venv-vllm/bin/python"
CHUNK = 32
LENGTHS = [301, 20, 97, 250, 64, 32, 31, 1, 128, 5]  # around edges of chunks; the longest is read in parts
SHAPES = dict(
    vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=2048, ttt_layers=[0, 2], ttt_chunk=CHUNK, ttt_lr=0.05,
    tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
QWEN3, LLAMA = exported.InPlaceTTTQwen3ForCausalLM, exported.InPlaceTTTLlamaForCausalLM
MODELS = {
    "qwen3": (QWEN3, {}),
    "input_embed, clipped": (QWEN3, dict(ttt_target="input_embed", ttt_clip=0.1)),
    "llama, clip of each layer, no projection": (LLAMA, dict(ttt_clip=[0.05, 0.2], ttt_proj=False)),
}

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="make test-serving creates the environment with vLLM")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, list[dict], list[list[int]]]]:
    """Folder of each model, the requests, and the tokens that the exported model generates for them."""
    found = {}
    for name, (kind, keys) in MODELS.items():
        torch.manual_seed(0)
        model = kind(kind.config_class(**SHAPES, **keys)).eval()
        for parameter, value in model.named_parameters():
            if value.dim() > 1:
                value.data.normal_(0, 0.3 if "ttt" in parameter else 0.1)
        model.generation_config.eos_token_id = None
        folder = tmp_path_factory.mktemp("model") / "exported"
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(architectures=[kind.__name__])))
        requests, expected = [], []
        for number, length in enumerate(LENGTHS):
            prompt = torch.randint(1, 198, (1, length))
            tokens = 70 if number % 2 else 40
            out = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
            requests.append(dict(prompt=prompt[0].tolist(), tokens=tokens))
            expected.append(out[0, length:].tolist())
        assert len(set(map(tuple, expected))) == len(expected)
        found[name] = folder, requests, expected
    return found


def serve(model: tuple, tmp_path: Path, **settings) -> subprocess.CompletedProcess:
    folder, requests, _ = model
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    words = [str(folder), str(tmp_path / "requests.json"), str(tmp_path / "settings.json")]
    return subprocess.run(
        [PYTHON, ROOT / "tests/serving/engine.py", *words], capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def tokens(done: subprocess.CompletedProcess) -> list[list[int]]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("TOKENS "))


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_exported_model(name, models, tmp_path):
    """Ten requests over three slots, prompts in parts of whole chunks; prefix caching is off by itself."""
    assert tokens(serve(models[name], tmp_path, max_num_batched_tokens=128)) == models[name][2]


def test_parts_of_any_size(models, tmp_path):
    assert tokens(serve(models["qwen3"], tmp_path, max_num_batched_tokens=101, max_num_seqs=4)) == models["qwen3"][2]


def test_preempted_requests_are_read_again(models, tmp_path):
    """With keys and values for fewer tokens than the requests have, vLLM takes requests out and starts them again."""
    done = serve(models["qwen3"], tmp_path, max_num_batched_tokens=128, num_gpu_blocks_override=5, max_num_seqs=4)
    assert tokens(done) == models["qwen3"][2]
    assert "PREEMPTED 0" not in done.stdout


@pytest.mark.parametrize("broken", ["slots are not cleared", "slots are exchanged", "decoded chunks are forgotten"])
def test_faults_are_seen(broken, models, tmp_path):
    found = tokens(serve(models["qwen3"], tmp_path, max_num_batched_tokens=128, broken=broken))
    assert found != models["qwen3"][2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(enable_prefix_caching=True), "prefix caching is not supported with fast weights"),
        (
            dict(compilation_config=dict(cudagraph_mode="FULL"), enforce_eager=False),
            "cudagraph_mode=FULL is not supported",
        ),
        (
            dict(speculative_config=dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)),
            "speculative decoding is not supported with fast weights",
        ),
    ],
)
def test_refused_in_a_sentence(settings, message, models, tmp_path):
    done = serve(models["qwen3"], tmp_path, **settings)
    assert done.returncode and message in done.stderr + done.stdout
