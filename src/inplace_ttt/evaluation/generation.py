"""Greedy answers to prompts: each prompt is read alone, without padding, and the answers are written together.

Reading is most of the work, and a kernel for attention without a mask does it fastest. Writing reads all keys and
values for each token, so many prompts share the weights of the model; they are of like length, and padded on the left.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from inplace_ttt.config import UserError, one_line
from inplace_ttt.evaluation.models import LoadedModel, check_tokens
from inplace_ttt.evaluation.steps import GreedySteps, SharedCache, empty_cache
from inplace_ttt.hf import modeling_inplace_ttt as exported

CHECK_INTERVAL = 8  # tokens between two looks whether all answers have ended


@dataclass(frozen=True)
class Prompt:
    """A prompt by its tokens, and how many more may be generated."""

    number: int  # of the sample, as its asker counts
    tokens: tuple[int, ...]
    new_tokens: int


def batches(sizes: Sequence[tuple[int, int]], most_tokens: int) -> list[list[int]]:
    """Return batches of at most ``most_tokens`` tokens with padding and answers (of one prompt at least), the longest
    first: what does not fit in memory fails at once.

    Args:
        sizes: (tokens, new tokens) of each prompt. A batch holds the numbers of prompts with as many new tokens.
    """
    found: list[list[int]] = []
    width = 0
    for number in sorted(range(len(sizes)), key=lambda one: (sizes[one][1], -sizes[one][0], one)):
        tokens, new = sizes[number]
        last = found[-1] if found else []
        if last and sizes[last[0]][1] == new and width * (len(last) + 1) <= most_tokens:
            last.append(number)
        else:
            found.append([number])
            width = tokens + new
    return sorted(found, key=lambda batch: -sizes[batch[0]][0])


def tokens_that_fit(network: PreTrainedModel) -> int:
    """Return how many tokens of prompts and answers fit in this device's memory beside the model, by the size of keys
    and values."""
    if network.device.type != "cuda":
        return 2**13
    config = network.config.get_text_config()
    attending = getattr(config, "num_attention_heads", None) or 1  # some models have no attention
    heads = getattr(config, "num_key_value_heads", None) or attending
    head = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // attending
    size = torch.finfo(network.dtype).bits // 8
    each = 2 * (getattr(config, "num_hidden_layers", None) or 1) * heads * head * size
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(0.7 * free / each)


@dataclass
class Speed:
    """Add up what a rank has read and written, and the seconds of each."""

    read: int = 0  # tokens of prompts
    reading: float = 0.0
    written: int = 0  # tokens of answers
    writing: float = 0.0

    def __str__(self) -> str:
        return (
            f"prompts read at {self.read / max(self.reading, 1e-9):,.0f} tokens a second ({self.reading:.0f} s), "
            f"answers written at {self.written / max(self.writing, 1e-9):,.0f} ({self.writing:.0f} s)"
        )


@torch.no_grad()
def answer(model: LoadedModel, batch: Sequence[Prompt], speed: Speed | None = None) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens. All have the same ``new_tokens``.

    A batch that does not fit in memory is answered in halves. Raises UserError where one prompt does not fit.
    """
    entries = model.network.get_input_embeddings().num_embeddings
    check_tokens(max(max(prompt.tokens) for prompt in batch), entries, model.name)
    try:
        return _answer(model, batch, speed or Speed())
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise UserError(
                f"'{model.name}' has no room for a prompt of {len(batch[0].tokens)} tokens on one GPU: use shorter "
                f"--lengths, or a GPU with more memory"
            ) from error
    except Exception as error:  # a model's own code raises anything
        raise cannot_run(model, error) from error
    torch.cuda.empty_cache()  # outside of the handler, which holds on to what it ran in
    half = len(batch) // 2
    return answer(model, batch[:half], speed) + answer(model, batch[half:], speed)


def _answer(model: LoadedModel, batch: Sequence[Prompt], speed: Speed) -> list[str]:
    network, tokenizer = model.network, model.tokenizer
    ends = network.generation_config.eos_token_id
    ends = {one for one in (ends if isinstance(ends, list) else [ends]) if one is not None}
    if not _can_share(network):
        return [_alone(model, prompt, ends) for prompt in batch]
    new_tokens = batch[0].new_tokens
    width = max(len(prompt.tokens) for prompt in batch)
    cache, first, finite, started = None, [], [], time.perf_counter()
    _use_attention(network)
    for number, prompt in enumerate(batch):
        own = empty_cache(network)
        ids = torch.tensor([prompt.tokens], device=network.device)
        out = network(ids, past_key_values=own, use_cache=True, logits_to_keep=1)
        first.append(out.logits[0, -1].argmax())
        finite.append(out.logits[0, -1].isfinite().all())
        if cache is None:
            cache = SharedCache(own, len(batch), width, new_tokens)
        cache.put(number, own)
        del own, out
    if not all(finite):  # waits for the device
        raise UserError(f"the logits of '{model.name}' are not finite: its weights may hold NaN; export it again")
    token = torch.stack(first)
    read = time.perf_counter()
    lengths = torch.tensor([len(prompt.tokens) for prompt in batch], device=network.device)
    texts = _write(GreedySteps(network, cache.finished(network), token, lengths, new_tokens), ends)
    speed.read += sum(len(prompt.tokens) for prompt in batch)
    speed.reading += read - started
    speed.written += sum(map(len, texts))
    speed.writing += time.perf_counter() - read
    return tokenizer.batch_decode(texts, skip_special_tokens=True)


def cannot_run(model: LoadedModel, error: Exception) -> UserError:
    """Return what says that a model's own code has failed."""
    return UserError(f"'{model.name}' cannot be run ({type(error).__name__}: {one_line(error)})")


def _write(steps: GreedySteps, ends: set[int]) -> list[list[int]]:
    """Return the tokens of each answer up to its end."""
    stops = torch.tensor(sorted(ends), device=steps.written.device)
    for count in range(1, steps.new_tokens):
        if count % CHECK_INTERVAL == 0 and bool(torch.isin(steps.written[:, :count], stops).any(dim=1).all()):
            break
        steps.take()
    return [_until(one, ends) for one in steps.written[:, : steps.count].tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((number for number, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _alone(model: LoadedModel, prompt: Prompt, ends: set[int]) -> str:
    """Answer by transformers' own generation: models whose caches are of a kind of their own."""
    network, tokenizer = model.network, model.tokenizer
    # not the folder's own generation config, which may sample
    greedy = GenerationConfig(
        max_new_tokens=prompt.new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    ids = torch.tensor([prompt.tokens], device=network.device)
    out = network.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=greedy, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    if not all(logits.isfinite().all() for logits in out.logits[:1]):
        raise UserError(f"the logits of '{model.name}' are not finite: its weights may hold NaN; export it again")
    return tokenizer.decode(_until(out.sequences[0, ids.shape[1] :].tolist(), ends), skip_special_tokens=True)


def _can_share(network: PreTrainedModel) -> bool:
    """Tell whether all layers keep keys and values of the whole text, and know positions by rotation alone: others keep
    a window, or something else, and may not take a mask of rows that begin at different places."""
    config = network.config
    plain = config._attn_implementation in ("sdpa", exported.GROUPED) and getattr(config, "rope_parameters", None)
    return bool(plain) and all(type(layer) is DynamicLayer for layer in empty_cache(network).layers)


def _use_attention(network: PreTrainedModel) -> None:
    """Let a model attend by the exported model's ``grouped_attention``, if it attends by torch's own."""
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(exported.GROUPED)
