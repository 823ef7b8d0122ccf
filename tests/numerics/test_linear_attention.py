"""Gated DeltaNet in place of softmax attention: token by token, in documents, layouts and runs."""

import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("fla")

from inplace_ttt.config import LinearAttention, UserError, linear_attention_sizes
from inplace_ttt.estimate import RankShard
from inplace_ttt.flops import forward_flops
from inplace_ttt.hf.convert import export_checkpoint
from inplace_ttt.training.records import read_metrics
from inplace_ttt.validation import validate
from launching import SMALL, run_main
from layouts import FULL, ONE_DOCUMENT, PP2, parallel
from models import VOCAB, Training, tiny_config, train_losses
from ranks import run_ranks

LINEAR = {"model": {"attention": "gated_delta_net", "linear_num_heads": 3, "linear_value_head_dim": 24}}


def by_definition(module, x: torch.Tensor) -> torch.Tensor:
    """Run one document (s, d) token by token: the gated delta rule, its convolutions, gate and norm, in fp64."""
    config, name = module.config, dict(module.named_parameters())
    weights = {key: value.detach().double() for key, value in name.items()}
    heads, k, v = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    x = x.double()
    projected = x @ weights["in_proj.weight"].T
    mixed, gate, beta, alpha = projected.split([heads * (2 * k + v), heads * v, heads, heads], dim=-1)
    taps = weights["conv1d.weight"][:, 0]
    padded = F.pad(mixed, (0, 0, taps.shape[1] - 1, 0))
    mixed = F.silu(sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[1])))
    query, key, value = mixed.split([heads * k, heads * k, heads * v], dim=-1)
    query, key = (F.normalize(one.view(-1, heads, k), dim=-1) for one in (query, key))
    value = value.view(-1, heads, v)
    decay = torch.exp(-weights["A_log"].exp() * F.softplus(alpha + weights["dt_bias"]))
    state, outs = x.new_zeros(heads, k, v), []
    for t in range(len(x)):
        state = decay[t][:, None, None] * state
        error = value[t] - torch.einsum("hk,hkv->hv", key[t], state)
        state = state + torch.einsum("h,hk,hv->hkv", beta[t].sigmoid(), key[t], error)
        outs.append(torch.einsum("hk,hkv->hv", query[t] * k**-0.5, state))
    out = torch.stack(outs)
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + config.layernorm_epsilon) * weights["out_norm.weight"]
    return (out * F.silu(gate.view(-1, heads, v))).reshape(len(x), -1) @ weights["out_proj.weight"].T


def module_errors() -> list[float]:
    from inplace_ttt.megatron.batch_context import BatchContext
    from inplace_ttt.ttt.layout import SequenceLayout

    training = Training(tiny_config(LINEAR))
    module, found = training.model.decoder.layers[1].self_attention, []
    module.out_norm.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(100, 2, 64)
    with torch.no_grad():
        expected = torch.stack([by_definition(module, x[:, row]) for row in range(2)], dim=1)
        out, bias = module(x)
        found.append((out - expected).abs().max() / expected.abs().max())
        assert bias is None
        bounds = (0, 7, 70, 100)
        context = BatchContext(layout=SequenceLayout(bounds))
        parts = [by_definition(module, x[a:b, 0]) for a, b in itertools.pairwise(bounds)]
        found.append((module(x[:, :1], packed_seq_params=context)[0][:, 0] - torch.cat(parts)).abs().max())
        assert (out[:, 0] - torch.cat(parts)).abs().max() > 1e-3  # the reset matters
    found.append(abs(sum(one.numel() for one in module.parameters()) - LinearAttention(3, 16, 24).parameters(64)))
    return [float(one) for one in found]


def test_the_module_by_definition():
    (found,) = run_ranks(1, module_errors)
    assert max(found) < 1e-5, found


def losses(*changes: dict) -> list:
    return train_losses(4, LINEAR, *changes)


@pytest.mark.slow
def test_layouts():
    """Data and pipeline parallelism, and recompute, train as one rank does; without resets it differs."""
    (one,) = run_ranks(1, losses)
    assert len({loss for loss, _ in one}) == 4
    for ranks, changes in ((2, ()), (2, (PP2,)), (1, (FULL,))):
        for found in run_ranks(ranks, losses, *changes)[-1:]:
            for (loss, norm), (right, right_norm) in zip(found, one, strict=True):
                assert loss == pytest.approx(right, rel=1e-5) and norm == pytest.approx(right_norm, rel=1e-4)
    (other,) = run_ranks(1, losses, ONE_DOCUMENT)
    assert other[0][0] != one[0][0]


@pytest.mark.slow
def test_a_run_resumes_and_is_not_exported(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    words = [
        *SMALL, "model.attention=gated_delta_net", "model.linear_num_heads=2", "model.linear_key_head_dim=8",
        "model.sliding_window=null", "train.steps=4", "train.eval_interval=2", "checkpoint.interval=2",
    ]  # fmt: skip
    ((code, printed),) = run_ranks(1, run_main, *words, f"run.dir={whole}")
    assert code == 0, printed
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints/step_00000004")
    ((code, printed),) = run_ranks(1, run_main, *words, f"run.dir={run}")
    assert code == 0 and "resuming from step 2" in printed, printed
    ends = [[one["loss"] for one in read_metrics(folder / "metrics.jsonl")][-2:] for folder in (run, whole)]
    assert ends[0] == ends[1]
    with pytest.raises(UserError, match=r"trained with model\.attention=gated_delta_net"):
        export_checkpoint(run, tmp_path / "exported")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (parallel(tensor_model=2), "parallel.tensor_model_parallel_size=2 is not supported with model.attention"),
        (parallel(context=2), "parallel.context_parallel_size=2 is not supported with model.attention"),
        ({"model": {"sliding_window": 8}}, "model.sliding_window=8 is not used by model.attention=gated_delta_net"),
        ({"model": {"attention": "softmax"}}, "model.linear_num_heads=3 is not used by model.attention=softmax"),
        ({"model": {"attention": "mamba"}}, "model.attention=mamba"),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        validate(tiny_config(LINEAR, changes), 2)


def test_sizes():
    config = tiny_config(LINEAR, {"model": {"vocab_size": VOCAB}})
    sizes = linear_attention_sizes(config.model)
    assert sizes == (3, 16, 24, 4)
    softmax = tiny_config({"model": {"vocab_size": VOCAB}})
    assert linear_attention_sizes(softmax.model) is None
    heads, d = 4 * 16, 64
    attention = d * (2 * heads + 2 * 2 * 16) + 2 * 16  # with the norms of queries and keys
    difference = RankShard(config, 1).parameters(0) - RankShard(softmax, 1).parameters(0)
    assert difference == 4 * (sizes.parameters(d) - attention)
    assert forward_flops(config).attention == 4 * sizes.state_flops(64)
