"""Tokenizers: any of Hugging Face's, or a byte-level BPE trained on the spot."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inplace_ttt.config import UserError, first_line

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by folder or by Hugging Face name; it must have an end-of-text token, which ends each document."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        place = "folder" if Path(name).exists() else "folder or Hugging Face name"
        raise UserError(
            f"no tokenizer could be loaded from {place} '{name}' ({first_line(error)[:200]}); "
            f"give a folder with tokenizer.json, or the name of a model on the hub"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no end-of-text token (eos_token), which must end every document")
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of ``vocab_size`` entries, the end-of-text token included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give every text the same numbers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()
