"""Answers in batches are those of each prompt alone."""

import random

import pytest
import torch

from inplace_ttt.data.tokenizer import train_tokenizer
from inplace_ttt.evaluation.generation import Prompt, answer, batches
from inplace_ttt.evaluation.models import Model
from numerics.test_exported_model import build


@pytest.fixture(scope="module")
def model():
    network = build("qwen3")
    tokenizer = train_tokenizer(["some words and others " * 50], 270)
    return Model("model", network, tokenizer)


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
