"""Where a demo prints: lines of styled text in columns, for a terminal, a pipe, or an SVG picture of what was printed.

Knows nothing of what is said on it. A line is kept as its pieces, so that the picture is made of what was really shown.
"""

import collections.abc
import os
import re
import typing
import xml.sax.saxutils

Style = typing.Literal["plain", "bold", "dim", "good", "bad", "key"]
Piece = tuple[Style, str]

_ANSI: dict[Style, str] = {
    "plain": "",
    "bold": "\x1b[1m",
    "dim": "\x1b[2m",
    "good": "\x1b[32m",
    "bad": "\x1b[31m",
    "key": "\x1b[1;36m",
}
# On the dark ground of the picture, whatever the page around it looks like.
_GROUND = "#161b22"
_FILL: dict[Style, str] = {
    "plain": "#d3d9e0",
    "bold": "#ffffff",
    "dim": "#8b949e",
    "good": "#56d364",
    "bad": "#ff7b72",
    "key": "#79c0ff",
}
_FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
_CELL_X, _CELL_Y, _MARGIN = 8.4, 18, 16
_NARROWEST_COLUMN = 24
_GAP = " │ "


def wants_colour(stream: typing.TextIO, environment: collections.abc.Mapping[str, str]) -> bool:
    """Whether to write colours: only to a terminal, and not where NO_COLOR has a value (no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def terminal_width(stream: typing.TextIO) -> int:
    """Returns: columns to fill: the terminal's, within reason; 116 where it goes to a file or a pipe."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except OSError:
        columns = 0  # a terminal that does not say
    return max(60, min(columns or 116, 140))


class Screen:
    """Prints, and remembers what it printed."""

    def __init__(self, stream: typing.TextIO, width: int, *, colour: bool) -> None:
        self.width = width
        self._stream = stream
        self._colour = colour
        self._lines: list[list[Piece]] = []

    def line(self, *pieces: Piece) -> None:
        """Print one line."""
        self._lines.append(list(pieces))
        for style, text in pieces:
            ansi = _ANSI[style] if self._colour and text.strip() else ""
            self._stream.write(f"{ansi}{text}\x1b[0m" if ansi else text)
        self._stream.write("\n")
        self._stream.flush()

    def rule(self) -> None:
        """Print a line across."""
        self.line(("dim", "─" * self.width))

    def paragraph(self, text: str, style: Style = "plain", *, label: str = "", indent: int = 2) -> None:
        """Print text, wrapped; with a label it stands to the right of it."""
        for i, part in enumerate(_wrap(text, self.width - indent, hanging=0)):
            head = label.ljust(indent) if i == 0 else " " * indent
            self.line(("dim", head), (style, part))

    def columns(self, titles: collections.abc.Sequence[str], cells: collections.abc.Sequence[list[Piece]]) -> None:
        """Print paragraphs side by side, each column under its title; one below the other where it is too narrow."""
        width = (self.width - 2 - len(_GAP) * (len(titles) - 1)) // len(titles)
        if width < _NARROWEST_COLUMN:
            for title, cell in zip(titles, cells, strict=True):
                self.line(("bold", f"  {title}"))
                for style, text in cell:
                    self.paragraph(text, style, indent=4)
            return
        self._row([[("bold", title)] for title in titles], [width] * len(titles))
        self.line(("dim", "  " + "─┼─".join("─" * width for _ in titles)))
        self._row(cells, [width] * len(titles))

    def table(self, rows: collections.abc.Sequence[collections.abc.Sequence[Piece]], elastic: int) -> None:
        """Print rows of cells, the first of them the titles; what is too long wraps in column ``elastic``."""
        widths = [max(len(row[i][1]) for row in rows) for i in range(len(rows[0]))]
        others = sum(widths) - widths[elastic] + len(_GAP) * (len(widths) - 1) + 2
        widths[elastic] = min(widths[elastic], max(_NARROWEST_COLUMN, self.width - others))
        for i, row in enumerate(rows):
            self._row([[piece] for piece in row], widths)
            if i == 0:
                self.line(("dim", "  " + "─┼─".join("─" * width for width in widths)))

    def _row(self, cells: collections.abc.Sequence[list[Piece]], widths: list[int]) -> None:
        columns: list[list[Piece]] = [
            [(style, part) for style, text in cell for part in _wrap(text, width)]
            for cell, width in zip(cells, widths, strict=True)
        ]
        for i in range(max(len(column) for column in columns)):
            pieces: list[Piece] = [("plain", "  ")]
            for column, width in zip(columns, widths, strict=True):
                style, part = column[i] if i < len(column) else ("plain", "")
                pieces += [(style, part.ljust(width)), ("dim", _GAP)]
            style, part = pieces[-2]
            # Nothing that only copies badly at the end of a line.
            self.line(*pieces[:-3], ("dim", _GAP if part.strip() else _GAP.rstrip()), (style, part.rstrip()))

    def svg(self, command: str) -> str:
        """Returns: a picture of all lines so far, below a prompt with the command that printed them."""
        lines: list[list[Piece]] = [[("good", "# "), ("bold", command)], [], *self._lines]
        longest = max(sum(len(text) for _, text in line) for line in lines)
        width = round(longest * _CELL_X + 2 * _MARGIN)
        height = len(lines) * _CELL_Y + 2 * _MARGIN
        title = xml.sax.saxutils.escape(f"Terminal output of {command}")
        rules = "".join(f".{style}{{fill:{fill}}}" for style, fill in _FILL.items())
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"',
            f' role="img"><title>{title}</title>\n<style>text{{font:14px {_FONT};white-space:pre}}',
            f".bold,.key{{font-weight:bold}}{rules}</style>\n",
            f'<rect width="100%" height="100%" rx="8" fill="{_GROUND}"/>\n',
        ]
        for number, line in enumerate(lines):
            y = _MARGIN + (number + 1) * _CELL_Y - 5
            parts += _svg_texts(line, y)
        return "".join(parts) + "</svg>\n"


def _svg_texts(line: list[Piece], y: int) -> collections.abc.Iterator[str]:
    """Yields: an element for each run of text between gaps, as long as its columns are, whatever the font."""
    column = 0
    for style, text in line:
        start = 0
        for word in [*text.split("  ")]:
            run = word.strip(" ")
            if run:
                x = _MARGIN + (column + start + len(word) - len(word.lstrip(" "))) * _CELL_X
                yield (
                    f'<text class="{style}" x="{x:.1f}" y="{y}" textLength="{len(run) * _CELL_X:.1f}">'
                    f"{xml.sax.saxutils.escape(run)}</text>\n"
                )
            start += len(word) + 2
        column += len(text)


def _wrap(text: str, width: int, hanging: int = 2) -> list[str]:
    """Returns: the text in lines, at least one; what goes on in a further line is indented.

    A word too long for a line, an URL mostly, goes on behind one of its slashes and the like.
    """
    lines = []
    line = text[: len(text) - len(text.lstrip(" "))]
    hanging = min(hanging, width // 8)
    for word in text.split():
        parts = [word] if len(word) <= width - hanging else _parts(word, width - hanging)
        for i, part in enumerate(parts):
            space = " " if line.strip() and i == 0 else ""
            if len(line) + len(space) + len(part) <= width:
                line += space + part
            else:
                lines.append(line)
                line = " " * hanging + part
    return [*lines, line]


def _parts(word: str, width: int) -> list[str]:
    parts = re.findall(r"/*[^/?&=]+[/?&=]*|[/?&=]+", word)
    return [part[i : i + width] for part in parts for i in range(0, len(part), width)]
