"""Compute per-token losses of a transformers model, without holding the logits of all tokens at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inplace_ttt.config import UserError
from inplace_ttt.data.position import PositionRanges
from inplace_ttt.evaluation.documents import Document
from inplace_ttt.evaluation.generation import cannot_run
from inplace_ttt.evaluation.models import LoadedModel

PART = 2**28  # maximum number of logits held at a time
PROBE_TOKENS = 64  # tokens of the forward pass that checks how a model computes its logits


@torch.no_grad()
def losses(model: LoadedModel, tokens: Tensor) -> Tensor:
    """Return the losses (n - 1,) fp32, in nats, of the tokens (n,) of a text except the first."""
    network = model.network
    ids, labels = tokens[None, :-1], tokens[1:]
    head = network.get_output_embeddings()
    if not _is_linear(model, ids):
        return F.cross_entropy(network(ids, use_cache=False).logits[0].float(), labels, reduction="none")
    hidden = network.base_model(ids, use_cache=False).last_hidden_state[0]
    rows = max(1, PART // head.weight.shape[0])
    parts = [
        F.cross_entropy(head(hidden[start : start + rows]).float(), labels[start : start + rows], reduction="none")
        for start in range(0, len(labels), rows)
    ]
    return torch.cat(parts)


def _is_linear(model: LoadedModel, ids: Tensor) -> bool:
    """Return True if the logits equal the output embeddings applied to the last hidden state, without further steps."""
    known = getattr(model.network, "_logits_are_linear", None)
    if known is None:
        network, few = model.network, ids[:, :PROBE_TOKENS]
        head = network.get_output_embeddings()
        known = False
        if head is not None and network.base_model is not network:
            hidden = network.base_model(few, use_cache=False).last_hidden_state
            known = torch.allclose(head(hidden).float(), network(few, use_cache=False).logits.float(), atol=1e-3)
        network._logits_are_linear = known
    return known


def sums_of(model: LoadedModel, document: Document, ranges: PositionRanges) -> list[list[float]]:
    """Return [summed loss in nats, tokens] of each range of positions.

    Raises UserError if the document does not fit in memory or the model fails.
    """
    try:
        tokens = torch.from_numpy(document.tokens).to(model.network.device)
        found = losses(model, tokens)
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{len(document.tokens)} tokens do not fit in one GPU's memory with '{model.name}': use a smaller "
            f"--length, or name the training checkpoint and use several GPUs (parallel.context_parallel_size)"
        ) from error
    except Exception as error:  # model code raises any type
        raise cannot_run(model, error) from error
    counts = torch.ones_like(found, dtype=torch.bool)
    if document.counts is not None:
        counts = torch.from_numpy(document.counts).to(found.device)
    positions = torch.arange(len(found), device=found.device)
    return ranges.sums(positions, found, counts).tolist()
