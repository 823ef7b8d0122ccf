"""Generate synthetic key-value recall: key-value pairs early in a sequence, queries of the keys late, noise elsewhere.

The distance between a pair and its query is larger than a sliding attention window, so only fast weights can answer.
Only answers count in the loss. Accuracy by chance is 1 / ``alphabet``.
"""

import numpy as np
import torch

from inplace_ttt.config import UserError
from inplace_ttt.data.batch import Sample

NOISE = 56  # number of noise tokens in the vocabulary
HELD_OUT_SEED = 1_000_003  # added to the seed of the run for held-out samples


def recall_vocab_size(alphabet: int) -> int:
    """Return the vocabulary size: keys, values and noise tokens."""
    return 2 * alphabet + NOISE


class KeyValueRecall:
    """Generate an endless sequence of samples; sample i depends only on the seed and i."""

    def __init__(self, seq_length: int, pairs: int, alphabet: int, seed: int):
        # pairs are in the first quarter of a sequence, queries in the second half: at least a quarter apart
        self.pair_slot = seq_length // 4 // pairs
        self.question_slot = seq_length // 2 // pairs
        if self.pair_slot < 2 or pairs > alphabet:
            raise UserError(
                f"data.recall_pairs={pairs} does not fit: data.seq_length={seq_length} allows {seq_length // 8} pairs "
                f"and data.recall_alphabet={alphabet} allows {alphabet}"
            )
        self.seq_length, self.pairs, self.alphabet, self.seed = seq_length, pairs, alphabet, seed

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng([self.seed, index])
        keys = rng.choice(self.alphabet, self.pairs, replace=False)
        values = self.alphabet + rng.integers(self.alphabet, size=self.pairs)
        text = 2 * self.alphabet + rng.integers(NOISE, size=self.seq_length + 1)
        mask = np.zeros(self.seq_length, np.float32)
        told = np.arange(self.pairs) * self.pair_slot + rng.integers(self.pair_slot - 1, size=self.pairs)
        asked = self.seq_length // 2 + np.arange(self.pairs) * self.question_slot
        asked += rng.integers(self.question_slot - 1, size=self.pairs)
        again = rng.permutation(self.pairs)
        text[told], text[told + 1] = keys, values
        text[asked], text[asked + 1] = keys[again], values[again]
        mask[asked] = 1.0
        return Sample(
            torch.from_numpy(text[:-1].copy()), torch.from_numpy(text[1:].copy()), torch.from_numpy(mask), None
        )
