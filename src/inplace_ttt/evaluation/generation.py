"""Decode prompts greedily: each prompt is prefilled separately without padding, then a batch is decoded together.

Prefill is most of the work, and is fastest with an attention kernel without a mask. Decode is bound by reading weights
and KV cache, so prompts of similar length are decoded as one batch, padded on the left.
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

CHECK_INTERVAL = 8  # decode steps between checks whether all answers have ended


@dataclass(frozen=True)
class Prompt:
    """Hold the token IDs of a prompt and the length of its answer."""

    number: int  # index of the sample in the caller's list
    tokens: tuple[int, ...]
    new_tokens: int  # maximum tokens to generate


def batches(sizes: Sequence[tuple[int, int]], most_tokens: int) -> list[list[int]]:
    """Return batches of prompt indices, longest prompts first, so that running out of memory shows at once.

    All prompts of a batch have the same number of new tokens. A batch has at most ``most_tokens`` tokens, including
    padding and answers, but at least one prompt.

    Args:
        sizes: (prompt tokens, new tokens) of each prompt.
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
    """Return the number of prompt and answer tokens whose KV cache fits in the free GPU memory; on CPU a constant."""
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
    """Count the prefill and decode tokens of a rank, and the seconds of both."""

    read: int = 0  # prompt tokens
    reading: float = 0.0  # prefill time in seconds
    written: int = 0  # answer tokens
    writing: float = 0.0  # decode time in seconds

    def __str__(self) -> str:
        return (
            f"prefill {self.read / max(self.reading, 1e-9):,.0f} tokens per second ({self.reading:.0f} s), "
            f"decode {self.written / max(self.writing, 1e-9):,.0f} tokens per second ({self.writing:.0f} s)"
        )


@torch.no_grad()
def answer(model: LoadedModel, batch: Sequence[Prompt], speed: Speed | None = None) -> list[str]:
    """Return the greedy continuation of each prompt, without special tokens. All have the same ``new_tokens``.

    A batch that does not fit in memory is split into halves. Raises UserError if a single prompt does not fit, if a
    token ID exceeds the vocabulary, if the logits are not finite, or if the model fails.
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
                f"a prompt of {len(batch[0].tokens)} tokens does not fit in one GPU's memory with '{model.name}': use "
                f"shorter --lengths, or a GPU with more memory"
            ) from error
    except Exception as error:  # model code raises any type
        raise cannot_run(model, error) from error
    torch.cuda.empty_cache()  # outside the handler: the exception keeps tensors of the failed frames alive
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
    if not all(finite):  # synchronises with the device
        raise UserError(f"the logits of '{model.name}' are not finite: its weights may contain NaN; export it again")
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
    """Return the error to raise when a model's own code fails."""
    return UserError(f"'{model.name}' cannot be run ({type(error).__name__}: {one_line(error)})")


def _write(steps: GreedySteps, ends: set[int]) -> list[list[int]]:
    """Decode until all answers have ended; return the token IDs of each answer up to its end."""
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
    """Answer one prompt with ``generate`` of transformers, for models with other cache types."""
    network, tokenizer = model.network, model.tokenizer
    # not the folder's generation config, which may sample
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
        raise UserError(f"the logits of '{model.name}' are not finite: its weights may contain NaN; export it again")
    return tokenizer.decode(_until(out.sequences[0, ids.shape[1] :].tolist(), ends), skip_special_tokens=True)


def _can_share(network: PreTrainedModel) -> bool:
    """Return True if ``SharedCache`` supports the model: full KV caches in all layers, and rotary positions only.

    Other models, such as those with sliding windows, may not accept a mask with left padding.
    """
    config = network.config
    plain = config._attn_implementation in ("sdpa", exported.GROUPED) and getattr(config, "rope_parameters", None)
    return bool(plain) and all(type(layer) is DynamicLayer for layer in empty_cache(network).layers)


def _use_attention(network: PreTrainedModel) -> None:
    """Replace torch's SDPA in a model by ``grouped_attention`` of the exported model."""
    if network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(exported.GROUPED)
