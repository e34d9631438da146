"""The page of the inspector: it shows text of any origin and obeys none, loads nothing, and its colours can be read."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import pytest
from test_pages import HOSTILE, Reader

from tasks.inspector import drawing
from tasks.inspector.diverging import Diverging, signed
from tasks.inspector.drawn_tree import from_the_best
from tasks.inspector.inspection import Completion, Inspection, Prompt, Token
from tasks.inspector.style import LENSES

INK = "#1b1f24"


class Page(Reader):
    VOID = frozenset({"meta", "img", "input"})


def token(number: int, text: str, control: str | None = None, value: float = 0.5, reward: float = -0.1) -> Token:
    return Token(number, text, control, -1.0, -1.5, 0.5, 2.0, value, reward, 0.25, 1.0, 0.75)


def completion(words: list[str], score: float = 1.0) -> Completion:
    tokens = [token(sum(map(ord, word)), word, value=0.1 * t) for t, word in enumerate(words)]
    return Completion((*tokens, token(1, "", "<|im_end|>", value=0.6, reward=score)), score, 0.5 * len(tokens), True)


def inspected(*completions: Completion, prompt: str = "Her film") -> Inspection:
    return Inspection(Prompt.of(prompt), completions, cycle=3, kl_coef=0.05)


def test_text_is_shown_and_never_obeyed() -> None:
    hostile = completion([HOSTILE, "\n", "</style></svg>", '" onmouseover="alert(1)'])
    named = replace(
        hostile, tokens=(replace(hostile.tokens[0], id=0, text="", control=f"<c> {HOSTILE}"), *hostile.tokens[1:])
    )
    chat = '[{"role": "system", "content": "<i>no</i>"}, {"role": "user", "content": "</div>"}]'
    page = Page(drawing.page([inspected(hostile, named, prompt=HOSTILE), inspected(hostile, prompt=chat)]))
    assert not page.open
    for text in (
        HOSTILE,
        f"<c> {HOSTILE}",
        "</style></svg>",
        "<i>no</i>",
        "system",
        "</div>",
        '" onmouseover="alert(1)',
    ):
        assert text in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "i", "c"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_loads_nothing() -> None:
    html = drawing.page([inspected(completion([" a", " film"]), completion([" a", " story"], -1.0))])
    assert not re.search(r"https?:|url\(|@import|src=|href=|<script", html)
    assert "default-src 'none'" in html


def test_nothing_is_drawn_where_nothing_was_inspected() -> None:
    assert drawing.blocks([]) == []


def test_every_token_has_its_four_colours_its_numbers_and_a_curve_without_gaps() -> None:
    one = completion([" a", " film", " that"])
    page = Page(str(drawing.blocks([inspected(one)])[1]))
    tokens = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert len(tokens) == 4
    assert all(re.findall(r"--(\w+):#[0-9a-f]{6}", each["style"] or "") == list(LENSES) for each in tokens)
    assert "token 2 of 4\nvalue before it +0.10, return +0.75\nreward -0.10\nadvantage +0.25" in (
        tokens[1]["title"] or ""
    )
    lines = [a["d"] or "" for tag, a in page.tags if tag == "path" and a.get("class") in ("value", "error")]
    ends = [re.fullmatch(r"M0 ([\d.]+)L(?:100|97) ([\d.]+)", line).groups() for line in lines]  # type: ignore[union-attr]
    assert [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]]
    # From 0 (bottom) to the score of 1 (top); the values on the way are 0, .1, .2, .6.
    assert [start for start, _ in ends] == ["96.0", "86.8", "77.6", "40.8"]
    assert ends[-1][1] == "4.0"


def test_lines_break_where_the_text_does_and_words_stay_whole() -> None:
    html = str(drawing.blocks([inspected(completion([" un", "watch", "able", ".\n", "It"]))])[1])
    (strip,) = re.findall(r'<div class="tokens" dir="ltr">(.*?)</div>', html, flags=re.DOTALL)
    words = [unescape(re.sub("<[^>]*>", "", word)) for word in strip.split('<span class="word">')[1:]]
    assert words == [" unwatchable.⏎", "It", "<|im_end|>"]
    assert strip.count('class="break"') == 1


def test_right_to_left_text_runs_so_and_its_curve_with_it() -> None:
    html = drawing.page([inspected(completion(["فيلم", " رائع"]))])
    assert '<div class="tokens" dir="rtl">' in html
    assert ".tokens[dir=rtl] svg { transform: scaleX(-1); }" in html


def test_completions_stand_in_the_order_of_the_tree_and_once() -> None:
    good, twice, bad, alike = (
        completion([" a", " b"], 2.0), completion([" a", " c"], 0.5), completion([" x"], -1.0), completion([" y"], 1.0),
    )  # fmt: skip
    assert from_the_best([bad, twice, alike, good, twice]) == [(good, 1), (twice, 2), (alike, 1), (bad, 1)]
    html = str(drawing.blocks([inspected(bad, twice, alike, good, twice)])[1])
    assert html.count("<section") == 4
    assert "said 2 times" in html
    tree = html[html.index("<svg") : html.index("</svg>")]
    assert re.findall(r'class="score"[^>]*>([^<]+)<', tree) == ["+2.00", "+0.50 ×2", "+1.00", "-1.00"]
    widths = [float(width) for width in re.findall(r'stroke-width="([\d.]+)"', tree)]
    assert widths == [12.0, 7.0, 2.0, 4.5, 2.0, 2.0]  # 5, 3, 1, 2, 1 and 1 of 5


def test_where_the_kl_is_no_part_of_the_rewards_the_page_says_so() -> None:
    one = inspected(completion([" a"]))
    assert "pays 0.05 times its KL" in drawing.blocks([one])[0]
    assert "no part of the rewards" in drawing.blocks([replace(one, kl_coef=0.0)])[0]


def test_colours_say_sign_and_size_and_ink_can_be_read_on_all_of_them() -> None:
    scale = Diverging.over([-2.0, 0.5])
    assert scale.limit == 2.0
    colours = [scale.colour(number) for number in (-2.0, -0.5, -0.02, 0.0, 0.02, 0.5, 2.0)]
    assert len(set(colours)) == 7
    assert all(contrast(colour, INK) > 4.5 for colour in colours)
    (red, _, blue), (_, _, above) = channels(scale.colour(-2.0)), channels(scale.colour(2.0))
    assert red > blue  # orange
    assert above > channels(scale.colour(2.0))[0]  # blue
    # The square root: a quarter of the limit is half the way.
    quarter, end, zero = (channels(scale.colour(x)) for x in (0.5, 2.0, 0.0))
    assert [round((e + z) / 2, 2) for e, z in zip(end, zero, strict=True)] == pytest.approx(quarter, abs=0.01)
    assert Diverging.over([]).colour(0.0) == Diverging.over([0.0]).colour(0.0)


@pytest.mark.parametrize(
    ("number", "shown"), [(0.0, "0"), (1.234, "+1.23"), (-0.5, "-0.50"), (0.00123, "+0.001"), (-2e-5, "-2e-05")]
)
def test_numbers_have_their_sign(number: float, shown: str) -> None:
    assert signed(number) == shown


def channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, contrast ratio."""
    lights = []
    for colour in (one, other):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
        lights.append(sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
