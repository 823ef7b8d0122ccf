"""Answers in batches are those of each prompt alone."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config

from exported_models import build
from inplace_ttt.config import UserError
from inplace_ttt.evaluation import generation, steps
from inplace_ttt.evaluation.generation import Prompt, answer, batches
from inplace_ttt.evaluation.models import LoadedModel
from inplace_ttt.hf.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def model():
    network = build("qwen3")
    tokenizer = train_tokenizer(["some words and others " * 50], 270)
    return LoadedModel("model", network, tokenizer)


def prompts(count, seed=0):
    rng = random.Random(seed)
    return [
        Prompt(number, tuple(rng.randrange(190) for _ in range(rng.randint(1, 70))), rng.choice([5, 20]))
        for number in range(count)
    ]


def test_batches_hold_every_prompt_once_and_fit():
    asked = prompts(60)
    sizes = [(len(prompt.tokens), prompt.new_tokens) for prompt in asked]
    found = [[sizes[number] for number in batch] for batch in batches(sizes, 200)]
    assert sorted(number for batch in batches(sizes, 200) for number in batch) == list(range(60))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(tokens + new for tokens, new in batch) <= 200
        assert len({new for _, new in batch}) == 1
    assert len(found) < 50
    lengths = [max(tokens for tokens, _ in batch) for batch in found]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(batch) for batch in batches(sizes, 1)] == [1] * 60


def test_answers_of_a_batch_equal_each_alone(model):
    asked = [prompt for prompt in prompts(12, 1) if prompt.new_tokens == 20]
    together = answer(model, asked)
    assert together == [answer(model, [prompt])[0] for prompt in asked]
    assert all(isinstance(text, str) for text in together) and any(together)


def generated(network, tokenizer, prompt, ends=None):
    """What transformers generates for a prompt alone."""
    greedy = GenerationConfig(max_new_tokens=prompt.new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0)
    ids = torch.tensor([prompt.tokens])
    out = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)[
        0, ids.shape[1] :
    ].tolist()
    return tokenizer.decode([token for token in out if token != ends], skip_special_tokens=True)


def plain(**changes):
    torch.manual_seed(0)
    config = dict(
        vocab_size=270, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(Qwen3Config(**config | changes)).eval()


@pytest.mark.parametrize("kind", ["fast weights", "grouped heads", "single heads", "eager", "window"])
def test_answers_equal_what_transformers_generates(model, kind):
    networks = {
        "fast weights": lambda: build("qwen3"),
        "grouped heads": plain,
        "single heads": lambda: plain(num_key_value_heads=4),
        "eager": lambda: plain(attn_implementation="eager"),
        "window": lambda: plain(use_sliding_window=True, sliding_window=8, max_window_layers=0),
    }
    network = networks[kind]()
    shared = LoadedModel("model", network, model.tokenizer)
    assert generation._can_share(network) == (kind not in ("eager", "window"))
    asked = [prompt for prompt in prompts(12, 3) if prompt.new_tokens == 20]
    expected = [generated(network, model.tokenizer, prompt) for prompt in asked]
    assert answer(shared, asked) == expected and len(set(expected)) > 3
    # an end in the middle of some answers
    ends = model.tokenizer(expected[0])["input_ids"][6]
    network.generation_config.eos_token_id = [ends]
    assert answer(shared, asked) == [generated(network, model.tokenizer, prompt, ends) for prompt in asked]


def test_models_whose_steps_no_graph_can_record(model, monkeypatch):
    """They go on without one, with the same answers."""
    asked = [prompt for prompt in prompts(8, 3) if prompt.new_tokens == 20]
    expected, tried = answer(model, asked), []

    def refuse(graph):
        tried.append(graph)
        raise RuntimeError("operation not permitted when stream is capturing")

    begin = steps.GreedySteps.__init__
    monkeypatch.setattr(
        steps.GreedySteps, "__init__", lambda self, *args: begin(self, *args) or setattr(self, "records", True)
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert answer(model, asked) == expected and len(tried) == 1


def test_a_batch_that_does_not_fit_is_answered_in_halves(model, monkeypatch):
    asked = [prompt for prompt in prompts(12, 1) if prompt.new_tokens == 20]
    expected, sizes, whole = answer(model, asked), [], generation._answer

    def short_of_memory(model, batch, speed):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no memory")
        return whole(model, batch, speed)

    monkeypatch.setattr(generation, "_answer", short_of_memory)
    assert answer(model, asked) == expected and max(sizes[1:]) == len(asked) - len(asked) // 2
    monkeypatch.setattr(generation, "_answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
    with pytest.raises(UserError, match=r"a prompt of .* tokens does not fit in one GPU's memory"):
        answer(model, asked)


def test_a_folder_that_samples_is_asked_greedily(model):
    (prompt,) = prompts(1, 2)
    before = answer(model, [prompt])
    kept = model.network.generation_config
    model.network.generation_config = type(kept)(do_sample=True, temperature=5.0, top_k=50, eos_token_id=None)
    try:
        torch.manual_seed(1)
        assert answer(model, [prompt]) == before
    finally:
        model.network.generation_config = kept
