"""Convert a GGUF file to a folder in Hugging Face format; quantized weights become bf16."""

import importlib.util
from pathlib import Path

from inplace_ttt.config import UserError, one_line


def unpack(file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of ``file`` to ``folder``; needs memory for the whole model in fp32.

    Raises UserError if the file cannot be read, or if the packages gguf and accelerate are not installed.
    """
    if not file.is_file():
        raise UserError(f"'{file}' does not exist")
    lacking = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise UserError(f"'{file}' cannot be read without {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"'{file}' cannot be read: {one_line(error)}") from error
    values = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
