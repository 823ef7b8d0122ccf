"""How an evaluation uses fast weights."""

from dataclasses import dataclass

from inplace_ttt.config import UserError


@dataclass(frozen=True)
class FastWeightMode:
    """Choose how an evaluation uses fast weights: as the model says itself, not at all, or clipped."""

    on: bool = True
    clip: float | None = None  # None: as the model's configuration says

    @classmethod
    def parse(cls, word: str) -> "FastWeightMode":
        """Read ``on``, ``off`` or ``clip=0.002``. Raise UserError for anything else."""
        if word in ("on", "off"):
            return cls(on=word == "on")
        number = word.removeprefix("clip=")
        try:
            clip = float(number)
        except ValueError:
            clip = 0.0
        if number == word or not 0 < clip < float("inf"):
            raise UserError(f"--fast-weights {word} is not understood: use on, off or clip=NUMBER, such as clip=0.002")
        return cls(clip=clip)

    def __str__(self) -> str:
        if not self.on:
            return "off"
        return "on" if self.clip is None else f"clip={self.clip:g}"
