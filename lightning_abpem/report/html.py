"""Pieces of HTML, in which words of the user's are shown as they are."""

from __future__ import annotations

import html
from collections.abc import Sequence

from lightning_abpem.display import visible
from lightning_abpem.report.style import CSS

__all__ = ["chart", "document", "number", "section", "shown", "table", "tiles"]


def document(title: str, body: Sequence[str]) -> str:
    """Return a whole page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # none: browsers would ask the server for one
        f"<title>{shown(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def shown(words: object) -> str:
    """Return words for HTML as they are: no markup, no control characters."""
    return html.escape(visible(str(words).encode("utf-8", "replace").decode(), lines=True))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number in words, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def section(title: str, *parts: str) -> str:
    """Return a part of the page; nothing if it would be empty."""
    body = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{shown(title)}</h2>\n{body}\n</section>" if body else ""


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return key numbers with what they are."""
    return '<div class="tiles">' + "".join(_tile(*both) for both in values) + "</div>"


def chart(title: str, caption: str, svg: str) -> str:
    """Return a chart with its title; `caption` is HTML."""
    return f"<figure><h3>{shown(title)}</h3><figcaption>{caption}</figcaption>{svg}</figure>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Return a table that scrolls by itself where the window is narrow.

    Args:
        heads: words of the columns.
        rows: HTML of the cells. One that begins with * is the best of its row.
        numbers: which columns hold numbers.
    """

    def cell(tag: str, i: int, text: str) -> str:
        classes = ["number"] * (i in numbers) + ["best"] * text.startswith("*")
        named = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{tag}{named}>{text.removeprefix('*')}</{tag}>"

    head = "".join(cell("th", i, shown(words)) for i, words in enumerate(heads))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    label = shown(f"table of {heads[0]}")
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _tile(words: str, value: str) -> str:
    return f'<div class="tile"><b>{shown(value)}</b><span>{shown(words)}</span></div>'
