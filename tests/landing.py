"""The figure of the landing page: the demo's accuracies, from their table in docs/method.

`python -m tests.landing` draws it anew.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
FIGURE = DOCS / "images" / "demo.svg"
_ROW = re.compile(r"^\| ([\w: ]+) \| ([\d.]+) % \| ([\d.]+) % \| (\+[\d.]+)", re.MULTILINE)
_LEFT, _WIDTH, _TOP, _STEP = 132, 170, 62, 26


def figure(page: str) -> str:
    """Draw the rows of the demo's table as an SVG that a phone's width shows in full."""
    rows = [(name, float(source), float(adapted), change) for name, source, adapted, change in _ROW.findall(page)]
    height = _TOP + _STEP * len(rows) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 360 {height}" font-family="system-ui, sans-serif" '
        'font-size="13" fill="#1c2024" role="img" aria-label="Accuracy of the source and of the adapted model">',
        f'<rect width="360" height="{height}" rx="8" fill="#ffffff"/>',
        f'<circle cx="{_LEFT + 6}" cy="18" r="5" fill="#8a8f98"/><text x="{_LEFT + 16}" y="22">source</text>',
        f'<circle cx="{_LEFT + 78}" cy="18" r="5" fill="#0b6e4f"/>',
        f'<text x="{_LEFT + 88}" y="22">adapted by ABPEM</text>',
    ]
    for share in (25, 50, 75, 100):
        at = _place(share)
        parts.append(f'<path d="M{at} 50V{height - 10}" stroke="#dfe3e6"/>')
        parts.append(f'<text x="{at}" y="44" text-anchor="middle" font-size="12" fill="#5a616a">{share} %</text>')
    for number, (name, source, adapted, change) in enumerate(rows):
        y = _TOP + _STEP * number + 6
        parts.append(
            f'<text x="10" y="{y + 4}">{name.replace("gaussian ", "").capitalize()}</text>'
            f'<path d="M{_place(source)} {y}H{_place(adapted)}" stroke="#0b6e4f" stroke-width="3"/>'
            f'<circle cx="{_place(source)}" cy="{y}" r="5" fill="#8a8f98"/>'
            f'<circle cx="{_place(adapted)}" cy="{y}" r="5" fill="#0b6e4f"/>'
            f'<text x="352" y="{y + 4}" text-anchor="end">{change}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(share: float) -> float:
    return round(_LEFT + _WIDTH * (share - 25) / 75, 1)


if __name__ == "__main__":
    FIGURE.write_text(figure((DOCS / "method.md").read_text(encoding="utf-8")), encoding="utf-8")
