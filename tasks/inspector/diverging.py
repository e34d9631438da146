"""Numbers on both sides of 0 as colours that every kind of colour vision tells apart: orange below, blue above."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

_BELOW, _ZERO, _ABOVE = (242, 156, 75), (246, 247, 248), (104, 174, 224)
"""sRGB. Light enough for the ink of the pages to be read on all of them."""
_SWATCHES = 9


@dataclass(frozen=True)
class Diverging:
    """A scale from -limit to limit. Colours follow the square root, so that small numbers beside large ones show."""

    limit: float

    @classmethod
    def over(cls, numbers: list[float]) -> Diverging:
        """The scale that holds all of them."""
        return cls(max(map(abs, numbers), default=0.0))

    def colour(self, number: float) -> str:
        """#rrggbb"""
        share = min(math.sqrt(abs(number) / self.limit), 1.0) if self.limit else 0.0
        end = _ABOVE if number > 0 else _BELOW
        return "#" + "".join(f"{round(zero + share * (e - zero)):02x}" for zero, e in zip(_ZERO, end, strict=True))

    def legend(self) -> Markup:
        """Swatches from one end to the other, each with its number."""
        places = [2 * i / (_SWATCHES - 1) - 1 for i in range(_SWATCHES)]
        numbers = [math.copysign(place**2 * self.limit, place) for place in places]
        swatch = Markup('<span style="background:{}">{}</span>')
        return Markup('<div class="swatches">{}</div>').format(
            Markup("").join(swatch.format(self.colour(number), signed(number)) for number in numbers)
        )


def signed(number: float) -> str:
    """With its sign and about two digits; 0 without."""
    if number == 0:
        return "0"
    return f"{number:+.2f}" if abs(number) >= 0.01 else f"{number:+.1g}"
