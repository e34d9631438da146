"""Parts of a report that become a page and Markdown alike, so that neither says more than the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.figure import Figure

from tasks import pages

Table = tuple[Sequence[str], list[list[object]]]


@dataclass(frozen=True)
class Section:
    """A part of the report; what it has stands in this order."""

    title: str
    text: str = ""
    table: Table | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    """Name of the picture and what it shows."""
    blocks: Sequence[Markup] = ()
    """For the page alone, drawn by hand; the Markdown says that it has them."""


def html(section: Section, drawn: Mapping[str, Figure]) -> list[Markup]:
    """Blocks of the page; `drawn` are the pictures by name."""
    blocks = [pages.heading(section.title)]
    if section.text:
        blocks.append(pages.paragraph(section.text))
    if section.table:
        blocks.append(pages.table(*section.table))
    if section.facts:
        blocks.append(pages.facts(section.facts))
    return [*blocks, *(pages.figure(drawn[name], about) for name, about in section.pictures.items()), *section.blocks]


def markdown(section: Section) -> str:
    """The same in Markdown, its pictures beside it as NAME.svg."""
    parts = [f"## {section.title}", section.text]
    if section.table:
        parts.append(pages.markdown_table(*section.table))
    if section.facts:
        parts.append(pages.markdown_table(["", ""], list(map(list, section.facts.items()))))
    parts += [f"![{about}]({name}.svg)\n\n{about}" for name, about in section.pictures.items()]
    if section.blocks:
        parts.append("Drawn on the page: report.html.")
    return "\n\n".join(part for part in parts if part)
