"""Clipping while reading, calibrated by training: how large updates were, layer by layer (paper, appendix C.2).

Past the length that a model was trained at, updates grow, and unclipped ones do damage. What no update of the training
exceeded, or few did, is a clip that changes nothing inside that length. Where clipped updates still add up to too much,
a bound of their sum past that length helps.
"""

from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.files import read_json
from inplace_ttt.ttt import histogram

HISTOGRAMS = "update_histograms.json"  # in a checkpoint; older ones have none
# What an export says where nobody asks for anything else; see choose_clip and choose_bound
READING_CLIP, READING_BOUND = "trained", "none"
Norms = dict[str, list[float]]  # by quantile: of each TTT layer the norm of a chunk's update over that of W_down


def update_norms(checkpoint: Path, layers: list[int]) -> Norms | None:
    """Return the quantiles of the updates that the second half of a checkpoint's histograms counted; None where a layer
    has none. Raises UserError for a damaged file."""
    path = checkpoint / HISTOGRAMS
    if not path.is_file() or not layers:
        return None
    content = read_json(path)
    try:
        noted = content["histograms"]
        if content["bins"] != histogram.SCALE:
            raise ValueError("bins of another kind")
        counts = {layer: [0] * histogram.BINS for layer in layers}
        for one in noted[len(noted) // 2 :]:
            for layer in layers:
                for number, count in one["layers"].get(str(layer), {}).items():
                    if type(count) is not int or not 0 <= int(number) < histogram.BINS or count < 0:
                        raise ValueError(f"count {count} in bin {number}")
                    counts[layer][int(number)] += count
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is damaged ({error}): remove it, or restore it") from error
    if not all(sum(numbers) for numbers in counts.values()):
        return None
    most = 10.0**histogram.HIGHEST
    return {
        name: [float(f"{min(histogram.quantile(counts[layer], q), most):.4g}") for layer in layers]
        for name, q in histogram.QUANTILES.items()
    }


def choose_clip(word: str, trained: float | None, norms: Norms | None, place: str) -> float | list[float] | None:
    """Return ``ttt_clip`` of an exported model by the word of --clip.

    Args:
        word: ``trained``, ``none``, a quantile (``p50``, ``p95``, ``p99``) or a number.
        trained: the clip of the training.
        place: the checkpoint, as errors name it.
    """
    if word == "trained":
        return trained
    if word == "none":
        return None
    if word in histogram.QUANTILES:
        if norms is None:
            raise UserError(
                f"--clip {word}: {place} holds no histograms of its updates (ttt.histogram_interval): use none or a "
                f"number"
            )
        if not all(norms[word]):
            raise UserError(f"--clip {word}: a layer of {place} wrote next to nothing: use none or a number")
        return norms[word]
    return _number("--clip", word, ("trained", "none", *histogram.QUANTILES))


def choose_bound(word: str, trained_length: int | None, place: str) -> float | None:
    """Return ``ttt_bound`` of an exported model by the word of --bound: ``none`` or a number.

    Args:
        trained_length: of the texts in training, in tokens.
        place: the checkpoint, as errors name it.
    """
    if word == "none":
        return None
    bound = _number("--bound", word, ("none",))
    if trained_length is None:
        raise UserError(f"--bound {word}: {place} does not say the length that it was trained at: use none")
    return bound


def _number(option: str, word: str, words: tuple[str, ...]) -> float:
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < 3e38:
        raise UserError(f"{option} {word} is not understood: use {', '.join(words)} or a number above 0")
    return number
