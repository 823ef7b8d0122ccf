"""How an evaluation uses fast weights."""

import math
from dataclasses import dataclass

from inplace_ttt.config import UserError


@dataclass(frozen=True)
class FastWeightMode:
    """Choose how an evaluation uses fast weights: as the model says itself, not at all, or clipped."""

    on: bool = True
    clip: float | None = None  # infinite: no clipping; None: as the model's configuration says, with its bound

    @classmethod
    def parse(cls, word: str) -> "FastWeightMode":
        """Read ``on``, ``off``, ``clip=0.002`` or ``clip=none``. Raise UserError for anything else."""
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
                f"--fast-weights {word} is not understood: use on, off, clip=none or clip=NUMBER, such as clip=0.002"
            )
        return cls(clip=clip)

    def clip_of(self, own: float | None) -> float | None:
        """Return the clip of a layer whose own is given."""
        if self.clip is None:
            return own
        return None if math.isinf(self.clip) else self.clip

    def bound_of(self, own: float | None) -> float | None:
        """Return the bound past the trained length of a model whose own is given: whoever names a clip has none."""
        return own if self.clip is None else None

    def __str__(self) -> str:
        if not self.on:
            return "off"
        if self.clip is None:
            return "on"
        return "clip=none" if math.isinf(self.clip) else f"clip={self.clip:g}"
