"""Find the layer that produces non-finite values."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from inplace_ttt.megatron.model import TTTGPTModel

NO_LAYER = 1_000_000  # larger than any layer number


def first_nonfinite_layer(model: TTTGPTModel, forward: Callable[[], None]) -> str:
    """Run ``forward`` again and return the name of the first module of the model with a non-finite output.

    Collective: all ranks must call it.
    """
    broken = [NO_LAYER]

    def watch(number: int):
        def look(module, inputs, output):
            tensor = output[0] if isinstance(output, tuple) else output
            if not torch.isfinite(tensor).all():
                broken[0] = min(broken[0], number)

        return look

    handles = [layer.register_forward_hook(watch(layer.layer_number)) for layer in model.decoder.layers]
    if model.pre_process:
        handles.append(model.embedding.register_forward_hook(watch(0)))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    first = torch.tensor(broken, device=next(model.parameters()).device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return _name(int(first))


def last_nonfinite_gradient(model: TTTGPTModel) -> str:
    """Return the name of the last module of the model with a non-finite gradient: the backward reached it first.

    Collective: all ranks must call it.
    """
    broken = -1
    for name, param in model.named_parameters():
        gradient = getattr(param, "main_grad", None)
        if gradient is not None and not torch.isfinite(gradient).all():
            parts = name.split(".")
            inside = parts[:2] == ["decoder", "layers"]
            broken = max(broken, model.decoder.layers[int(parts[2])].layer_number if inside else 0)
    last = torch.tensor([broken], device=next(model.parameters()).device)
    dist.all_reduce(last, op=dist.ReduceOp.MAX)
    return _name(int(last) if int(last) >= 0 else NO_LAYER)


def _name(number: int) -> str:
    if number == NO_LAYER:
        return "the output layer"
    return "the embedding" if number == 0 else f"layer {number - 1}"
