"""Exported models for the tests in tests/serving, and the tokens that they generate."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from inplace_ttt.hf import modeling_inplace_ttt as exported
from launching import ROOT

HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("vllm") is not None
PYTHON = Path(sys.executable) if HAS_GPU else ROOT / ".venv-vllm/bin/python"
CHUNK = 32
SHAPES = dict(
    vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
    num_key_value_heads=2, max_position_embeddings=2048, ttt_layers=[0, 2], ttt_chunk=CHUNK, ttt_lr=0.05,
    tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
QWEN3, QWEN2 = exported.InPlaceTTTQwen3ForCausalLM, exported.InPlaceTTTQwen2ForCausalLM
LLAMA = exported.InPlaceTTTLlamaForCausalLM


class Served(NamedTuple):
    """A model's folder, requests, and the tokens that the exported model generates for each."""

    folder: Path
    requests: list[dict]
    expected: list[list[int]]


def make_model(place: Path, kind: type, keys: dict, lengths: list[int]) -> Served:
    """Write a model with random weights, and generate the tokens after random prompts of these lengths."""
    torch.manual_seed(0)
    model = kind(kind.config_class(**SHAPES | keys)).eval()
    for parameter, value in model.named_parameters():
        if value.dim() > 1:
            value.data.normal_(0, 0.3 if "ttt" in parameter else 0.1)
    model.generation_config.eos_token_id = None
    folder = place / "exported"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | dict(architectures=[kind.__name__])
    for key, default in exported.FAST_WEIGHT_KEYS.items():
        if config[key] == default:  # files from before a key was added lack it
            del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    requests, expected = [], []
    for number, length in enumerate(lengths):
        prompt = torch.randint(1, 198, (1, length))
        tokens = 70 if number % 2 else 40
        out = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
        requests.append(dict(prompt=prompt[0].tolist(), tokens=tokens))
        expected.append(out[0, length:].tolist())
    assert len(set(map(tuple, expected))) == len(expected)
    return Served(folder, requests, expected)
