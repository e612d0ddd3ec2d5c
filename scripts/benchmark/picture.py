"""The picture for a visitor: what each proxy costs, a panel of bars per figure, shortest first, ours set apart."""

import collections.abc
import html

from .report import DIRECT, OURS, Cells, number

# One figure of each kind; those that were not measured are left out.
PANELS = (
    ("small-16", "1 KiB request, CPU µs"),
    ("bulk-down", "1 GiB download, CPU s"),
    ("chunked-down", "1 GiB in chunks, CPU s"),
    ("tls-down", "1 GiB over TLS, CPU s"),
)
LEFT, BARS, WIDTH = 100, 220, 380
LINE, TITLE, MARGIN = 24, 44, 16


def _bars(cells: Cells) -> list[tuple[str, float]]:
    column = next(column for column in cells.figure.columns if column.key == "cpu")
    medians = [(peer, cells.median(peer, column)) for peer in cells.rounds if peer != DIRECT]
    return sorted(((peer, value) for peer, value in medians if value is not None), key=lambda bar: bar[1])


def _panel(title: str, bars: list[tuple[str, float]], left: int, top: int) -> list[str]:
    parts = [f'<text x="{left}" y="{top + 20}" class="title">{html.escape(title)}</text>']
    longest = max(value for _peer, value in bars)
    for at, (peer, value) in enumerate(bars):
        y = top + TITLE + at * LINE
        kind = "ours" if peer == OURS else "other"
        length = value / longest * BARS
        parts += [
            f'<text x="{left + LEFT - 8}" y="{y + 13}" class="{kind} name">{html.escape(peer)}</text>',
            f'<rect x="{left + LEFT}" y="{y}" width="{length:.1f}" height="{LINE - 6}" rx="2" class="{kind}"/>',
            f'<text x="{left + LEFT + length + 6:.1f}" y="{y + 13}" class="{kind}">{number(value)}</text>',
        ]
    return parts


def as_svg(all_cells: collections.abc.Iterable[Cells], heading: str) -> str:
    """Draw the figures of PANELS, two in a row. Returns: an SVG document; with nothing to show, one with no panel."""
    by_name = {cells.figure.name: cells for cells in all_cells}
    panels = [(title, bars) for name, title in PANELS if name in by_name and (bars := _bars(by_name[name]))]
    height = TITLE + MARGIN + LINE * max((len(bars) for _title, bars in panels), default=0)
    parts = []
    for at, (title, bars) in enumerate(panels):
        parts += _panel(title, bars, MARGIN + at % 2 * (WIDTH + MARGIN), MARGIN + at // 2 * height)
    total_width, total_height = 2 * WIDTH + 3 * MARGIN, MARGIN + (len(panels) + 1) // 2 * height + LINE
    # White beneath, so that it reads on a dark page too.
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" role="img">',
            "<title>CPU time per request and per GiB, shorter is better</title>",
            "<style>text{font:13px system-ui,sans-serif;fill:#444}.title{font-weight:600;fill:#111}"
            ".name{text-anchor:end}rect.other{fill:#b8c0cc}rect.ours{fill:#d9480f}"
            "text.ours{font-weight:700;fill:#d9480f}.foot{font-size:10px;fill:#777}</style>",
            f'<rect width="{total_width}" height="{total_height}" fill="#fff"/>',
            *parts,
            f'<text x="{MARGIN}" y="{total_height - 10}" class="foot">Shorter is better. {html.escape(heading)}</text>',
            "</svg>",
            "",
        ]
    )
