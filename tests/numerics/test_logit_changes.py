"""Changes of logits by fast weights equal those of the model's own forward."""

import pytest
import torch

import hf_models
from exported_models import CHUNK, QWEN3, SMALL
from inplace_ttt.data.recall import KeyValueRecall
from inplace_ttt.evaluation.logit_changes import measure

LAYERS = hf_models.SMALL["num_hidden_layers"]
TASK = KeyValueRecall(4 * CHUNK, pairs=4, alphabet=50, seed=1)


def model(**changes):
    torch.manual_seed(0)
    options = SMALL | dict(head_dim=16, ttt_layers=[0, LAYERS - 1]) | changes
    network = QWEN3(QWEN3.config_class(**options)).eval()
    for name, parameter in network.named_parameters():
        if "ttt" in name:
            parameter.data.normal_(0, 0.3)
    return network


def outputs(network, tokens):
    """Return what the last MLP gives, (s, d), with its fast weights and without."""
    found, mlp = [], network.fast_mlps[-1]
    handle = mlp.register_forward_hook(lambda _, inputs, output: found.append(output[0]))
    eta = mlp.eta
    try:
        for value in (eta, 0.0):
            mlp.eta = value
            with torch.no_grad():
                network(tokens[None], use_cache=False)
    finally:
        mlp.eta = eta
        handle.remove()
    return found


@pytest.mark.parametrize("changes", [{}, dict(ttt_target="input_embed", ttt_proj=False)])
def test_changes_are_those_of_the_forward(changes):
    network, sample = model(**changes), TASK[0]
    on, off = outputs(network, sample.tokens)
    logits = (on - off) * network.model.norm.weight @ network.get_output_embeddings().weight[50:100].T
    asked = sample.loss_mask.nonzero().squeeze(1)
    own = torch.nn.functional.one_hot(sample.labels[asked] - 50, 50).bool()
    found = measure(network, TASK, 1, reconstruct=False)
    torch.testing.assert_close(found.right, logits[asked][own].detach(), rtol=1e-4, atol=1e-5)
    largest = logits[asked].masked_fill(own, 0).abs().amax(1).detach()
    torch.testing.assert_close(found.wrong, largest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_bounds_are_those_of_one_update(reconstruct):
    """The update of the pair's key alone, eta v z^T as a matrix, changes logits by the bounds."""
    network, sample, inputs = model(), TASK[0], []
    mlp, kernel = network.fast_mlps[-1], network.fast_mlps[-1].ttt_conv.weight.detach().clone()
    found = measure(network, TASK, 1, reconstruct=reconstruct)
    assert mlp.ttt_conv.weight.equal(kernel)
    if reconstruct:
        for one in network.fast_mlps:
            one.ttt_conv.weight.data.zero_()[:, 0, one.ttt_conv.weight.shape[-1] // 2] = 1.0
    handle = mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        network(sample.tokens[None], use_cache=False)
    handle.remove()
    x, embeddings = inputs[0].detach(), network.get_output_embeddings().weight.detach() * network.model.norm.weight
    for number, n in enumerate(sample.loss_mask.nonzero().squeeze(1).tolist()):
        t = sample.tokens.tolist().index(sample.tokens[n].item())
        first = t // CHUNK * CHUNK
        with torch.no_grad():
            z = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            v = mlp.ttt_proj(mlp.ttt_conv(x[None, first : first + CHUNK]))[0, t - first]
            change = embeddings[50:100] @ (mlp.eta * torch.outer(v, z[t]) @ z[n])
        right = sample.labels[n].item() - 50
        others = max(abs(one) for w, one in enumerate(change.tolist()) if w != right)
        assert found.wrong_bound[number].item() == pytest.approx(others, rel=1e-3, abs=1e-6)
        if not reconstruct:
            expected = change[right].item() * (1 if z[n] @ z[t] > 0 else -1)  # c_align is positive
            assert found.right_bound[number].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
