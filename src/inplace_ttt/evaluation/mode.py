"""Set the fast-weight mode of an evaluation (``--fast-weights``)."""

import math
from dataclasses import dataclass
from pathlib import Path

from inplace_ttt.config import TTT, UserError


@dataclass(frozen=True)
class FastWeightMode:
    """Describe the use of fast weights: as the model is configured, off, or with another clip."""

    on: bool = True  # False: no fast weights
    clip: float | None = None  # clip value; inf: no clipping; None: clip and bound of the model's configuration

    @classmethod
    def parse(cls, word: str) -> "FastWeightMode":
        """Parse ``on``, ``off``, ``clip=0.002`` or ``clip=none``. Raises UserError for any other word."""
        if word in ("on", "off"):
            return cls(on=word == "on")
        if word == "clip=none":
            return cls(clip=math.inf)
        number = word.removeprefix("clip=")
        try:
            clip = float(number)
        except ValueError:
            clip = 0.0
        if number == word or not 0 < clip < float("inf"):
            raise UserError(
                f"--fast-weights {word} is not a valid mode: use on, off, clip=none or clip=NUMBER, such as clip=0.002"
            )
        return cls(clip=clip)

    def check_rule(self, ttt: TTT, path: Path) -> None:
        """Raise UserError if the mode clips updates, and the update rule of a checkpoint does not support it."""
        if self.clip is not None and not math.isinf(self.clip) and ttt.decay != 1:
            raise UserError(
                f"--fast-weights clip={self.clip:g} does not support ttt.decay={ttt.decay} of '{path}': use on, off or "
                f"clip=none"
            )

    def clip_of(self, own: float | None) -> float | None:
        """Return the clip to use for a layer whose configured clip is ``own``; None: no clipping."""
        if self.clip is None:
            return own
        return None if math.isinf(self.clip) else self.clip

    def bound_of(self, own: float | None) -> float | None:
        """Return the bound beyond the training length for a model with bound ``own``; None if the mode sets a clip."""
        return own if self.clip is None else None

    def __str__(self) -> str:
        if not self.on:
            return "off"
        if self.clip is None:
            return "on"
        return "clip=none" if math.isinf(self.clip) else f"clip={self.clip:g}"
