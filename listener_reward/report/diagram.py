"""A reliability diagram as a drawing of its own: how sure a judge was against how many people agreed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping

import numpy as np

from listener_reward.evaluate.confidence import reliability


def reliability_svg(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], size: int = 360) -> str:
    """A reliability diagram as SVG: for each name in `curves`, (labels, p_first). Dots are as large as their bins."""
    colors = ("#b5533c", "#2b6ca3", "#5b8c3e")
    margin = 44

    def place(confidence: float, agreement: float) -> tuple[str, str]:
        across = margin + (confidence - 0.5) * 2 * (size - 2 * margin)
        up = size - margin - agreement * (size - 2 * margin)
        return f"{across:.1f}", f"{up:.1f}"

    (x0, y0), (x1, y1), middle = place(0.5, 0), place(1, 1), place(0.5, 0.5)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" font-family="sans-serif" font-size="12">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#888"/>',
        f'<path d="M{middle[0]} {middle[1]}L{x1} {y1}" stroke="#888" stroke-dasharray="4 3"/>',
    ]
    for value in (0.5, 0.75, 1.0):
        lines.append(f'<text x="{place(value, 0)[0]}" y="{size - margin + 16}" text-anchor="middle">{value:.2f}</text>')
    for value in (0.0, 0.5, 1.0):
        lines.append(f'<text x="{margin - 6}" y="{place(0.5, value)[1]}" text-anchor="end">{value:.1f}</text>')
    lines.append(f'<text x="{size / 2}" y="{size - 8}" text-anchor="middle">confidence of the judge</text>')
    turned = f'transform="rotate(-90 12 {size / 2})"'
    lines.append(f'<text x="12" y="{size / 2}" text-anchor="middle" {turned}>share of people who agree</text>')
    for number, (name, (labels, p_first)) in enumerate(curves.items()):
        color, bins = colors[number % len(colors)], reliability(labels, p_first)
        points = [place(one.confidence, one.agreement) for one in bins]
        lines.append(f'<path d="M{"L".join(map(" ".join, points))}" fill="none" stroke="{color}"/>')
        for one, (x, y) in zip(bins, points, strict=True):
            title = f"<title>{one.n} pairs: confidence {one.confidence:.3f}, agreement {one.agreement:.3f}</title>"
            lines.append(
                f'<circle cx="{x}" cy="{y}" r="{2 + 10 * math.sqrt(one.n / len(labels)):.1f}" fill="{color}" '
                f'fill-opacity="0.6">{title}</circle>'
            )
        lines.append(f'<text x="{margin + 10}" y="{margin + 16 * number}" fill="{color}">{html.escape(name)}</text>')
    return "\n".join([*lines, "</svg>", ""])
