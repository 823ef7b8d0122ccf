"""Greedy answers to prompts, in batches of prompts of like length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from inplace_ttt.evaluation.models import Model


@dataclass(frozen=True)
class Prompt:
    """A prompt by its tokens, and how many more may be generated."""

    number: int  # of the sample, as its asker counts
    tokens: tuple[int, ...]
    new_tokens: int


def batches(prompts: Sequence[Prompt], most_tokens: int) -> list[list[Prompt]]:
    """Return batches of at most ``most_tokens`` tokens with padding (of one prompt at least), the longest first: what
    does not fit in memory fails at once."""
    found: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda one: (one.new_tokens, -len(one.tokens), one.number)):
        last = found[-1] if found else []
        alike = bool(last) and last[0].new_tokens == prompt.new_tokens
        if alike and len(last[0].tokens) * (len(last) + 1) <= most_tokens:
            last.append(prompt)
        else:
            found.append([prompt])
    return sorted(found, key=lambda batch: -len(batch[0].tokens))


@torch.no_grad()
def answer(model: Model, batch: Sequence[Prompt]) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens. All have the same ``new_tokens``."""
    network, tokenizer = model.network, model.tokenizer
    width = max(len(prompt.tokens) for prompt in batch)
    ends = network.generation_config.eos_token_id
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.full((len(batch), width), padding)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, prompt in enumerate(batch):
        ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, width - len(prompt.tokens) :] = 1
    # not the folder's own generation config, which may sample
    greedy = GenerationConfig(
        max_new_tokens=batch[0].new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=padding
    )
    device = network.device
    out = network.generate(ids.to(device), attention_mask=mask.to(device), generation_config=greedy)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
