"""The look of all reports: well-formed, self-contained, and text of any origin shown as it is."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from tasks import pages

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single' {title} %s"


class Reader(HTMLParser):
    """An independent reading of a page: text, tags with attributes, and whether the tags close in order."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def drawing() -> Figure:
    with pages.chart(columns=2) as (fig, (left, right)):
        left.plot([0, 1, 2], [1, 0, 3], label="a line")
        left.legend()
        right.set_title("Empty")
    return fig


def settings() -> dict[str, object]:
    """Matplotlib's global ones, less the backend, which it picks when it is first asked."""
    return {name: value for name, value in mpl.rcParams.items() if name != "backend"}


def whole_page() -> str:
    return pages.page(
        f"Title {HOSTILE}",
        f"Lead {HOSTILE}",
        [
            pages.verdict(False, f"Verdict {HOSTILE}"),
            pages.key_figures([(f"Label {HOSTILE}", 0.5, f"Note {HOSTILE}")]),
            pages.heading(f"Heading {HOSTILE}"),
            pages.paragraph(f"Paragraph {HOSTILE}"),
            pages.table([f"Header {HOSTILE}", "n"], [[f"Cell {HOSTILE}", 1.0]], f"Caption {HOSTILE}"),
            pages.facts({f"Key {HOSTILE}": f"Value {HOSTILE}"}),
            pages.figure(drawing(), f"Alt {HOSTILE}"),
            f"Plain block {HOSTILE}",
        ],
    )


def test_every_block_shows_text_and_never_obeys_it() -> None:
    html = whole_page()
    page = Reader(html)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for start in (
        "Title", "Lead", "Verdict", "Label", "Note", "Heading", "Paragraph", "Header", "Cell", "Caption", "Key",
        "Value", "Alt", "Plain block",
    ):  # fmt: skip
        assert f"{start} {HOSTILE}" in page.text
    image = next(attributes for tag, attributes in page.tags if tag == "img")
    assert image["alt"] == f"Alt {HOSTILE}"


def test_a_page_loads_nothing() -> None:
    html = whole_page()
    page = Reader(html)
    loaded = [
        value or "" for _, attributes in page.tags for name, value in attributes.items() if name in {"src", "href"}
    ]
    assert loaded
    assert all(value.startswith("data:image/svg+xml;base64,") for value in loaded)
    assert "url(" not in html
    assert "@import" not in html
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_columns_of_numbers_are_told_from_columns_of_text() -> None:
    table = Reader(pages.table(["text", "number", "mixed", "truth"], [["a", 1, 1, True], ["b", None, "x", False]]))
    heads = [attributes.get("class") for tag, attributes in table.tags if tag == "th"]
    assert heads == [None, "n", None, None]
    with pytest.raises(ValueError, match="zip"):
        pages.table(["one"], [["a", "b"]])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12345, "12,345"), (np.int64(7), "7"), (0.123456, "0.123"), (2.4, "2.40"), (15.06, "15.1"), (1234.5, "1,234"),
        (-0.5, "-0.500"), (1.5e-5, "1.5e-05"), (0.0, "0.000"), (np.float32(0.25), "0.250"), (float("nan"), "–"),
        (None, "–"), (True, "yes"), (False, "no"), ("text", "text"), (Path("a/b"), "a/b"),
    ],
)  # fmt: skip
def test_values_are_shown_for_people(value: object, shown: str) -> None:
    assert pages.show(value) == shown


def test_markdown_shows_what_the_cells_hold() -> None:
    cells = [
        "a|b",
        "*x* _y_ `z` snake_case",
        "[l](http://e.org) ![i](j.svg)",
        "<b>&amp;</b>",
        "one\ntwo",
        r"back\slash ~~s~~",
        "> $5 & &gt; $6",
    ]
    rows = [[cell, 0.5] for cell in cells]
    html = MarkdownIt("gfm-like", {"linkify": False}).render(pages.markdown_table(["text", "n|"], rows))
    table = ElementTree.fromstring(html)
    assert [cell.text for cell in table.iter("td")][::2] == [cell.replace("\n", " ⏎ ") for cell in cells]
    assert [cell.text for cell in table.iter("th")] == ["text", "n|"]
    assert all(not list(cell) for cell in table.iter("td"))


def test_a_badge_keeps_its_words_in_markdown() -> None:
    assert pages.markdown_text(pages.badge("a < b", "bad")) == "a &#60; b"
    assert isinstance(pages.badge("x"), Markup)


def test_the_same_figure_gives_the_same_bytes_and_changes_no_settings() -> None:
    before = settings()
    assert pages.svg(drawing()) == pages.svg(drawing())
    assert settings() == before
    assert ElementTree.fromstring(pages.svg(drawing())).tag.endswith("svg")


def test_pictures_move_into_markdown(tmp_path: Path) -> None:
    (tmp_path / "plot.svg").write_bytes(b"<svg/>")
    others = " and [a page](report.html) ![web](https://x/plot.svg) ![gone](gone.svg)"
    embedded = pages.embed_pictures(f"![a plot](plot.svg){others}", tmp_path)
    assert embedded == f"![a plot](data:image/svg+xml;base64,PHN2Zy8+){others}"


def test_pages_are_light_to_import() -> None:
    code = "import sys, tasks.pages; sys.exit(any(name in sys.modules for name in ('matplotlib', 'numpy', 'pandas')))"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
