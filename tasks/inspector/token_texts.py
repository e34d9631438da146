"""What single tokens say, as far as that can be shown: parts of characters, control tokens, signs that nobody sees."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ppo_core.tokens import decode

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", "\x7f": "␡"} | {
    chr(code): chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\r\t"
}
_JOINERS = "\u200c\u200d"
"""Format characters without which scripts and emoji fall apart; they do nothing to their surroundings."""
_UNSEEN = ("Cc", "Cf", "Zl", "Zp")


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of all, which they make up together.

    A token that is a part of a character adds nothing, the one that completes it adds all of it; control tokens add
    nothing.
    """
    whole, end = decode(tokenizer, ids), 0
    found = []
    for t in range(1, len(ids) + 1):
        # A character that still lacks some of its bytes is read as U+FFFD, and differs from what it will be.
        start, end = end, max(end, _shared(decode(tokenizer, ids[:t]), whole))
        found.append(whole[start:end])
    return found


def control_name(tokenizer: Any, token: int) -> str:
    """How a token that is no text is written, such as `<|im_end|>`."""
    name: str = tokenizer.decode([token], skip_special_tokens=False)
    return name


def visible(text: str) -> str:
    """The text with a sign in place of what cannot be seen: line ends, tabs, controls, marks that turn directions."""
    return "".join(_SIGNS.get(character) or _seen(character) for character in text)


def runs_right_to_left(text: str) -> bool:
    """Whether the first letter that has a direction belongs to a script that does."""
    kinds = (unicodedata.bidirectional(character) for character in text)
    return next((kind != "L" for kind in kinds if kind in ("L", "R", "AL")), False)


def cells(text: str) -> int:
    """Width in a monospaced font, in cells: wide characters take two, combining ones none."""
    return sum(map(_cells, text))


def elide(text: str, limit: int) -> str:
    """The text, or its beginning and end with a sign between them, in at most `limit` cells."""
    if cells(text) <= limit:
        return text
    end = (limit - 1) // 3
    return _head(text, limit - 1 - end) + "…" + _head(text[::-1], end)[::-1]


def _shared(one: str, other: str) -> int:
    """How many characters they begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _head(text: str, limit: int) -> str:
    used = 0
    for i, character in enumerate(text):
        used += _cells(character)
        if used > limit:
            return text[:i]
    return text


def _cells(character: str) -> int:
    if unicodedata.combining(character) or character in _JOINERS:
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _seen(character: str) -> str:
    if unicodedata.category(character) in _UNSEEN and character not in _JOINERS:
        return f"⟨{ord(character):04X}⟩"
    return character
