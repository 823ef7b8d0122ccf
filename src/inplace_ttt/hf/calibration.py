"""Calibrate clips for inference from the update norms of training, per layer (paper, appendix C.2).

Beyond the training length updates grow, and unclipped ones harm the model. A clip that no update of training exceeded
(or few did) changes nothing within that length. The sum of clipped updates can still grow; a bound limits it.
"""

from pathlib import Path

from inplace_ttt.config import UserError
from inplace_ttt.files import read_json
from inplace_ttt.ttt import histogram

HISTOGRAMS = "update_histograms.json"  # file in a checkpoint; older ones have none
# Defaults of --clip and --bound in an export, see choose_clip and choose_bound
READING_CLIP, READING_BOUND = "trained", "0.5"
Norms = dict[str, list[float]]  # per quantile and TTT layer: norm of one chunk's update / norm of W_down


def update_norms(checkpoint: Path, layers: list[int]) -> Norms | None:
    """Return quantiles of update norms over the second half of a checkpoint's histograms; None if a layer has none.

    Raises UserError if the file of histograms is damaged.
    """
    path = checkpoint / HISTOGRAMS
    if not path.is_file() or not layers:
        return None
    content = read_json(path)
    try:
        noted = content["histograms"]
        if content["bins"] != histogram.SCALE:
            raise ValueError("unknown bins")
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
    """Return ``ttt_clip`` of an exported model for a value of --clip.

    Args:
        word: ``trained``, ``none``, a quantile (``p50``, ``p95``, ``p99``) or a number.
        trained: the clip in training.
        norms: quantiles from ``update_norms``.
        place: name of the checkpoint in messages.

    Raises UserError for any other word, or for a quantile if the checkpoint has no histograms.
    """
    if word == "trained":
        return trained
    if word == "none":
        return None
    if word in histogram.QUANTILES:
        if norms is None:
            raise UserError(
                f"--clip {word}: {place} has no histograms of updates (ttt.histogram_interval): use none or a number"
            )
        if not all(norms[word]):
            raise UserError(f"--clip {word}: a layer of {place} has update norms close to zero: use none or a number")
        return norms[word]
    return _number("--clip", word, ("trained", "none", *histogram.QUANTILES))


def choose_bound(word: str, trained_length: int | None, place: str) -> float | None:
    """Return ``ttt_bound`` of an exported model for a value of --bound: ``none`` or a number.

    Args:
        word: value of --bound.
        trained_length: training length in tokens; None: not known.
        place: name of the checkpoint in messages.

    Raises UserError for any other word, or for a number if the training length is not known.
    """
    if word == "none":
        return None
    bound = _number("--bound", word, ("none",))
    if trained_length is None:
        raise UserError(f"--bound {word}: the training length of {place} is not known: use none")
    return bound


def _number(option: str, word: str, words: tuple[str, ...]) -> float:
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < 3e38:
        raise UserError(f"{option} {word} is not valid: use {', '.join(words)} or a number above 0")
    return number
