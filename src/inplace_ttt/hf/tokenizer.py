"""Load a tokenizer of Hugging Face, or train a byte-level BPE."""

import os
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inplace_ttt.config import UserError, one_line
from inplace_ttt.hub import hub_is_reached, is_hub_name

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or by its Hugging Face name. Code in its folder is never executed.

    Raises UserError if it does not exist or cannot be loaded.
    """
    path = os.path.expanduser(name)
    local = Path(path).exists()
    if not local and not is_hub_name(name):
        raise UserError(
            f"no tokenizer could be loaded from '{name}', which does not exist: give a folder with tokenizer.json, or "
            f"the name of a model on the hub"
        )
    try:
        return AutoTokenizer.from_pretrained(
            path if local else name, trust_remote_code=False, local_files_only=local or not hub_is_reached()
        )
    except RecursionError as error:
        raise UserError(f"tokenizer '{name}' cannot be loaded: one of its files is nested too deeply") from error
    except Exception as error:
        place = "folder" if local else "folder or Hugging Face name"
        out = "" if local or hub_is_reached() else "the hub cannot be reached; "
        raise UserError(
            f"no tokenizer could be loaded from {place} '{name}' ({out}{one_line(error)}); "
            f"give a folder with tokenizer.json, or the name of a model on the hub"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with ``vocab_size`` entries, including the end-of-text token.

    Example::

        >>> tokenizer = train_tokenizer(["the cat sat on the mat"], 260)
        >>> len(tokenizer), tokenizer.decode(tokenizer("the cat")["input_ids"])
        (260, 'the cat')
    """
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
    """Return a SHA-256 digest; tokenizers with the same digest produce the same token IDs."""
    from inplace_ttt.hf.modeling_inplace_ttt import fingerprint_of_tokenizer  # that file must not import this package

    return fingerprint_of_tokenizer(tokenizer)


def embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embedding rows: the largest token ID plus 1, since token IDs may have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the tokenizer adds its begin-of-text token to a text by default."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
