"""Measure how fast weights change logits in key-value recall, against the bounds of Theorem 1 (arXiv 2604.06169).

A key ``k*`` at position t is followed by a value ``v*``, and asked again at position n. The update of t changes the
logit of a token w at n by ``eta (e_w . v_t) (z_n . z_t)``, where ``e_w`` is w's output embedding. The theorem bounds
this change for two targets ``v_t``, with ``c_align = |z_n . z_t|``:

next token's embedding
    The logit of v* rises by at least ``eta c_norm^2 c_align``, with ``c_norm^2 = e_v* . v_t``. Any other moves by at
    most ``eta eps c_align``, with ``eps = max_w |e_w . v_t|``.
current token's embedding (reconstruction)
    The logit of v* moves by at most ``eta eps c_align``.

The measured changes are those by all updates that the query sees. Noise and other pairs interfere, which the theorem
excludes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inplace_ttt.data.recall import KeyValueRecall
from inplace_ttt.ttt.target import identity_kernel


@dataclass(frozen=True)
class LogitChanges:
    """Hold changes of logits in the last TTT layer, each (queries,), before the division by the final norm's RMS."""

    right: Tensor  # change of the right value's logit
    wrong: Tensor  # largest change of another value's logit, in absolute value
    right_bound: Tensor  # eta c_norm^2 c_align; reconstruction: eta eps c_align
    wrong_bound: Tensor  # eta eps c_align
    recalled: float  # share of queries whose right value has the highest logit


@torch.no_grad()
def measure(network: PreTrainedModel, task: KeyValueRecall, samples: int, *, reconstruct: bool) -> LogitChanges:
    """Measure logit changes at the queries of a recall task.

    Args:
        network: exported model whose last layer has fast weights.
        task: source of samples; sample i of ``samples`` is ``task[i]``.
        reconstruct: replace the target convolutions by the identity, so that targets are made from the current token.
    """
    kernels = {mlp: mlp.ttt_conv.weight.detach().clone() for mlp in network.fast_mlps}
    try:
        if reconstruct:
            for mlp in network.fast_mlps:
                mlp.ttt_conv.weight.copy_(identity_kernel(tuple(mlp.ttt_conv.weight.shape)))
        found = [_sample(network, task, number, reconstruct) for number in range(samples)]
    finally:
        for mlp, kernel in kernels.items():
            mlp.ttt_conv.weight.copy_(kernel)
    right, wrong, right_bound, wrong_bound, recalled = (torch.cat(parts) for parts in zip(*found, strict=True))
    return LogitChanges(right, wrong, right_bound, wrong_bound, float(recalled.double().mean()))


def _sample(network: PreTrainedModel, task: KeyValueRecall, number: int, reconstruct: bool) -> tuple[Tensor, ...]:
    sample, mlp, seen = task[number], network.fast_mlps[-1], {}
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0][0]))
    try:
        logits = network(sample.tokens[None], use_cache=False).logits[0]
    finally:
        handle.remove()
    x = seen["x"]
    z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    u = network.get_input_embeddings()(sample.tokens) if mlp.reads_embeddings else x
    chunk = network.config.ttt_chunk
    v = torch.cat([mlp.ttt_conv(part[None])[0] for part in u.split(chunk)])
    v = v if mlp.ttt_proj is None else mlp.ttt_proj(v)
    embeddings = (network.get_output_embeddings().weight * network.model.norm.weight)[task.alphabet : 2 * task.alphabet]

    asked = sample.loss_mask.nonzero().squeeze(1)
    values = sample.labels[asked] - task.alphabet
    # the only earlier occurrence of each key
    told = (sample.tokens[None] == sample.tokens[asked, None]).int().argmax(1)
    overlap = z[asked] @ z.T  # (queries, s)
    overlap *= torch.arange(len(z)) < asked[:, None] // chunk * chunk  # updates of earlier chunks
    changes = mlp.eta * (overlap @ v) @ embeddings.T  # (queries, values)
    own = torch.nn.functional.one_hot(values, task.alphabet).bool()
    align = z[asked].mul(z[told]).sum(1).abs()  # c_align
    reach = v[told] @ embeddings.T  # e_w . v_t
    wrong_bound = mlp.eta * reach.masked_fill(own, 0).abs().amax(1) * align
    right_bound = wrong_bound if reconstruct else mlp.eta * reach[own] * align
    best = logits[asked][:, task.alphabet : 2 * task.alphabet].argmax(1)
    return changes[own], changes.masked_fill(own, 0).abs().amax(1), right_bound, wrong_bound, best == values
