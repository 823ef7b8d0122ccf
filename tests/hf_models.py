"""Small models in Hugging Face's format, and what Megatron's model computes of them."""

from pathlib import Path

import torch
from safetensors.torch import load_file

SMALL = dict(
    vocab_size=199,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
)


def our_logits(imported: str, text, sizes: dict, ttt: dict | None = None):
    """Logits of all tokens on the last pipeline stage, gathered over the vocabulary."""
    import torch.distributed as dist
    import yaml
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from inplace_ttt.megatron import runtime
    from inplace_ttt.megatron.checkpoint import Checkpointer
    from inplace_ttt.megatron.model import build_model
    from inplace_ttt.megatron.optimizer import build_optimizer, wrap_data_parallel
    from inplace_ttt.ttt.layout import SequenceLayout
    from models import tiny_config

    model = yaml.safe_load(Path(f"{imported}/model.yaml").read_text())
    config = tiny_config(
        {"model": model, "ttt": ttt or {"enabled": False}, "data": {"seq_length": len(text)}, "parallel": sizes}
    )
    groups = runtime.start(config.parallel, 0)
    ours = build_model(config, torch.float32, "local", config.model.vocab_size, groups)
    wrapped = wrap_data_parallel(ours, ours.config, config)
    optimizer, _ = build_optimizer(wrapped, ours.config, config)
    Checkpointer(None, ours, optimizer, groups, keep=1, async_save=False).load_weights(Path(imported))
    tokens = torch.tensor(text)[None]
    positions, layout = torch.arange(len(text))[None], SequenceLayout(documents=None)
    found = []

    def forward(batches, model):
        out = model(tokens, positions, layout)
        return out, lambda logits: found.append(logits) or (logits.sum(), {})

    with torch.no_grad():
        get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)(
            forward_step_func=forward,
            data_iterator=None,
            model=[wrapped.eval()],
            num_microbatches=1,
            seq_length=len(text),
            micro_batch_size=1,
            forward_only=True,
        )
    if not found:
        return None
    parts = [torch.empty_like(found[0]) for _ in range(groups.tp.size())]
    dist.all_gather(parts, found[0].contiguous(), group=groups.tp)
    return torch.cat(parts, dim=-1)[0, :, : config.model.vocab_size].numpy()


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
