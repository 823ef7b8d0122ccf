"""The model equals the plain one while fast weights are at their start; its parts equal their definitions."""

import pytest
import torch
import torch.nn.functional as F

from inplace_ttt.megatron.batch_context import BatchContext
from inplace_ttt.ttt.layout import SequenceLayout
from models import Training, tiny_config, train_losses
from numerics.cases import largest
from ranks import run_ranks


def logits(*changes, start_values=False):
    training = Training(tiny_config(*changes))
    if start_values:
        for module in training.model.ttt_modules.values():
            module.ttt_conv.weight.data.zero_()
    batch = training.batches(0)[0]
    with torch.no_grad():
        return training.model.eval()(batch.tokens, batch.position_ids, batch.layout).numpy()


def test_fast_weights_at_their_start_are_the_plain_model():
    plain = torch.from_numpy(run_ranks(1, logits, {"ttt": {"enabled": False}})[0])
    start = torch.from_numpy(run_ranks(1, _at_start)[0])
    switched_on = torch.from_numpy(run_ranks(1, logits)[0])
    torch.testing.assert_close(start, plain, rtol=1e-5, atol=1e-5)
    assert (switched_on - plain).abs().max() > 1e-2


def _at_start():
    return logits(start_values=True)


def without_convolution(project: bool):
    """Logits at the start, of the plain model and with fast weights, and fast-weight parameters before and after."""
    from inplace_ttt.megatron.initialize import initialize

    config = tiny_config({"ttt": {"convolution": False, "project": project, "eta": 0.02}})
    training = Training(config)
    initialize(training.model, config, training.groups)
    batch = training.batches(0)[0]

    def look():
        with torch.no_grad():
            return training.model.eval()(batch.tokens, batch.position_ids, batch.layout).numpy()

    def parameters():
        found = training.model.named_parameters()
        return {name: value.detach().numpy().copy() for name, value in found if ".ttt_" in name}

    start, before = look(), parameters()
    for module in training.model.ttt_modules.values():
        module.is_plain = True
    plain = look()
    for module in training.model.ttt_modules.values():
        module.is_plain = False
    training.optimizer.reload_model_params()
    training.model.train()
    for number in range(2):
        training.step(number)
    return start, plain, before, parameters()


@pytest.mark.parametrize("project", [True, False])
def test_without_a_convolution(project):
    """The convolution stays the identity; P starts at 0 and is trained; without it the first updates are not 0."""
    start, plain, before, after = run_ranks(1, without_convolution, project)[0]
    assert (abs(start - plain).max() > 1e-2) is not project
    for name, value in before.items():
        if ".ttt_conv." in name:
            assert (value[:, 0] == [0, 0, 1, 0, 0]).all()
            assert (after[name] == value).all()
        else:
            assert not value.any()
            assert after[name].any()
    assert any(".ttt_proj." in name for name in before) is project


def test_recompute_changes_nothing():
    plain = run_ranks(1, train_losses, 2)[0]
    assert run_ranks(1, train_losses, 2, {"train": {"recompute": "full"}})[0] == plain


def losses_and_attentions(*changes):
    """What two steps give, and how often attention is computed in them."""
    from inplace_ttt.megatron.attention import DocumentAttention

    calls, attend = [], DocumentAttention.attend

    def counted(self, *args):
        calls.append(self)
        return attend(self, *args)

    DocumentAttention.attend = counted
    return train_losses(2, *changes), len(calls)


@pytest.mark.parametrize("cp", [1, 2])
def test_recompute_without_attention_changes_nothing(cp):
    parallel = {"parallel": {"context_parallel_size": cp}}
    full = {"recompute": "full"}
    losses, attentions = run_ranks(cp, losses_and_attentions, parallel)[0]
    assert run_ranks(cp, losses_and_attentions, parallel, {"train": full})[0] == (losses, 2 * attentions)
    kept = {"train": full | {"recompute_core_attn": False}}
    assert run_ranks(cp, losses_and_attentions, parallel, kept)[0] == (losses, attentions)


def attention_error(window, documents):
    from types import SimpleNamespace

    from inplace_ttt.megatron.attention import DocumentAttention

    config = SimpleNamespace(kv_channels=8, window_size=None if window is None else (window - 1, 0))
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    attention = DocumentAttention(config, 1, None, None, pg_collection=alone)
    torch.manual_seed(0)
    s = 48
    q, k, v = torch.randn(s, 2, 4, 8), torch.randn(s, 2, 2, 8), torch.randn(s, 2, 2, 8)
    out = attention(q, k, v, packed_seq_params=BatchContext(layout=SequenceLayout(documents)))
    place = torch.arange(s)
    starts = torch.tensor(documents or (0, s))
    document = torch.searchsorted(starts, place, right=True)
    seen = (place[:, None] >= place) & (document[:, None] == document)
    if window is not None:
        seen &= place[:, None] - place < window
    scores = torch.einsum("sbhd,tbhd->bhst", q, k.repeat_interleave(2, dim=2)) * 8**-0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, v.repeat_interleave(2, dim=2)).reshape(s, 2, -1)
    return (out - expected).abs().max().item()


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("documents", [None, (0, 16, 17, 48)])
def test_attention_is_masked_softmax(window, documents):
    assert attention_error(window, documents) < 1e-5


def cross_entropy_errors(vocab_size: int, part_numel: int):
    import torch.distributed as dist

    from inplace_ttt.megatron import runtime
    from inplace_ttt.megatron.loss import linear_cross_entropy

    size = dist.get_world_size()
    groups = runtime.start(tiny_config({"parallel": {"tensor_model_parallel_size": size}}).parallel, 0)
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 2, 16), torch.randn(32 * 4, 16)
    labels, counts = torch.randint(0, vocab_size, (2, 6)), torch.rand(2, 6) > 0.3
    reference = [t.clone().double().requires_grad_() for t in (hidden, weight)]
    scores = (reference[0] @ reference[1][:vocab_size].T).permute(1, 0, 2)
    expected = F.cross_entropy(scores.reshape(12, -1), labels.reshape(12), reduction="none").view(2, 6)
    (3 * expected[counts].sum()).backward()

    rows = 128 // size
    shard = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    hidden.requires_grad_()
    mine = weight[shard].clone().requires_grad_()
    options = dict(vocab_size=vocab_size, tp_group=groups.tp, sequence_parallel=False, part_numel=part_numel)
    total, loss, correct = linear_cross_entropy(hidden, mine, labels, counts, **options)
    (3 * total).backward()
    with torch.no_grad():
        again = linear_cross_entropy(hidden, mine, labels, counts, **options)
    runtime.stop()
    assert all(one.equal(other) for one, other in zip(again, (total, loss, correct), strict=True))
    assert not loss.requires_grad and not correct.requires_grad
    assert torch.equal(correct.bool(), scores.argmax(dim=-1) == labels)
    return [
        (loss - expected).abs().max().item(),
        (total - expected[counts].sum()).abs().item() / 12,
        (hidden.grad - reference[0].grad).abs().max().item(),
        (mine.grad - reference[1].grad[shard]).abs().max().item(),
    ]


@pytest.mark.parametrize(
    ("size", "vocab_size", "part_numel"),
    [(1, 128, 2**20), (1, 101, 1), (2, 128, 300), (2, 60, 300), (4, 101, 2**20), (4, 60, 1)],  # 60: ranks of padding
)
def test_cross_entropy_of_a_split_and_padded_vocabulary(size, vocab_size, part_numel):
    for errors in run_ranks(size, cross_entropy_errors, vocab_size, part_numel):
        assert largest(errors) < 1e-5


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, attention_factor=1.5, beta_fast=16.0),
        dict(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=8192,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ],
)
def test_rope_equals_transformers(scaling):
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    from inplace_ttt.megatron.rope import rope_frequencies

    model = tiny_config({"model": {"rope_scaling": scaling, "rotary_base": 500000.0}}).model
    config = Qwen3Config(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default", **scaling},
    )
    theirs = Qwen3RotaryEmbedding(config)
    inv_freq, attention_factor = rope_frequencies(model, 4096)
    assert torch.equal(inv_freq, theirs.inv_freq)
    assert attention_factor == theirs.attention_scaling


def rope_in_bf16():
    """Cosines and sines of late positions in a model in bf16, the exact ones, and its floating-point buffers."""
    training = Training(tiny_config(), dtype=torch.bfloat16)
    positions = torch.arange(30000, 30064)
    exact = torch.outer(positions.double(), _frequencies(training.config))
    buffers = [name for name, buffer in training.model.named_buffers() if buffer.is_floating_point()]
    found = training.model.rope(positions[None]).squeeze(dim=(1, 2))
    return found.numpy(), torch.cat((exact.cos(), exact.sin()), dim=1).numpy(), buffers


def _frequencies(config):
    exponents = torch.arange(0, config.model.kv_channels, 2, dtype=torch.float64) / config.model.kv_channels
    return config.model.rotary_base**-exponents


def test_a_model_in_bf16_does_not_round_rope():
    """Megatron converts all buffers of a model to bf16: the frequencies must not be one, and nothing else may be."""
    found, exact, buffers = run_ranks(1, rope_in_bf16)[0]
    assert abs(found - exact).max() < 2e-3  # 30,000 radians in fp32
    assert not buffers
