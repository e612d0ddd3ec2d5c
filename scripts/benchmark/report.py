"""From cells to tables: medians, spread, ratios, and whether each goal is met."""

import collections.abc
import dataclasses
import math
import statistics

from .figures import BEST, Column, Figure, Goal

OURS = "ours"
DIRECT = "direct"


@dataclasses.dataclass(slots=True)
class Cells:
    """What the rounds of one figure gave: per proxy a list with the values of a round, or why there are none."""

    figure: Figure
    rounds: dict[str, list[dict[str, float] | str]] = dataclasses.field(default_factory=dict)

    def add(self, peer: str, outcome: dict[str, float] | str) -> None:
        """Keep the outcome of a round; rounds come in order, for each proxy once."""
        self.rounds.setdefault(peer, []).append(outcome)

    def error(self, peer: str) -> str | None:
        """Tell why a proxy has no numbers: one wrong round is enough."""
        errors = [outcome for outcome in self.rounds[peer] if isinstance(outcome, str)]
        return f"{len(errors)} of {len(self.rounds[peer])} rounds wrong: {errors[0]}" if errors else None

    def values(self, peer: str, column: Column) -> list[float]:
        """List a column's values of a proxy over the rounds; empty if one was wrong or the column is not for it."""
        if self.error(peer) is not None:
            return []
        if column.derive is not None:
            steps = [self.median(peer, other) for other in self.figure.columns if other.derive is None]
            medians = [step for step in steps if step is not None]
            return [column.derive(medians)] if len(medians) == len(steps) else []
        found = [outcome.get(column.key) for outcome in self.rounds[peer] if not isinstance(outcome, str)]
        values = [value for value in found if value is not None]
        if not column.added or peer == DIRECT:
            return values
        base = self.median(DIRECT, column) if DIRECT in self.rounds else None
        return [] if base is None else [value - base for value in values]

    def median(self, peer: str, column: Column) -> float | None:
        """Give the median of a column, or None."""
        values = self.values(peer, column)
        return statistics.median(values) if values else None


def number(value: float) -> str:
    """Write a number with three significant digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    middle = number(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """A goal, applied: to which proxy, the ratio (or our own value), and whether it is met."""

    goal: Goal
    peer: str | None
    ratio: float
    met: bool

    def text(self) -> str:
        """Say it in a few words."""
        sign = "≥" if self.goal.at_least else "≤"
        ratio = "more" if math.isinf(self.ratio) else f"{self.ratio:.2f}"
        return f"{ratio} {sign} {self.goal.factor:g} {'✓' if self.met else '✗'}"


def judge(cells: Cells) -> list[Verdict]:
    """Apply a figure's goals; those whose proxies were not measured are left out."""
    verdicts = []
    columns = {column.key: column for column in cells.figure.columns}
    for goal in cells.figure.goals:
        column = columns[goal.column]
        own = cells.median(OURS, column) if OURS in cells.rounds else None
        if own is None:
            continue
        medians = {
            peer: median
            for peer in cells.rounds
            if peer not in (OURS, DIRECT) and (median := cells.median(peer, column)) is not None
        }
        if not goal.peers:
            verdicts.append(Verdict(goal, None, own, _met(goal, own)))
        for name in goal.peers:
            peer = min(medians, key=lambda each: medians[each], default=None) if name == BEST else name
            if peer is not None and peer in medians:
                # An added delay may drown in the noise and come out at nothing or less, where a ratio says nothing.
                ratio = max(0.0, own) / medians[peer] if medians[peer] > 0 else (math.inf if own > 0 else 0.0)
                verdicts.append(Verdict(goal, peer, ratio, _met(goal, ratio)))
    return verdicts


def _met(goal: Goal, value: float) -> bool:
    return value >= goal.factor if goal.at_least else value <= goal.factor


def table(cells: Cells) -> tuple[list[str], list[list[str]]]:
    """Lay out a figure. Returns: the titles, and a row per proxy."""
    verdicts = judge(cells)
    judged = [
        column
        for column in cells.figure.columns
        if any(verdict.peer is not None and verdict.goal.column == column.key for verdict in verdicts)
    ]
    titles = ["", *(column.title for column in cells.figure.columns)]
    titles += [f"ours ÷ it: {column.title}" for column in judged]
    rows = []
    for peer in cells.rounds:
        error = cells.error(peer)
        row = [peer, *(_cell(cells.values(peer, column)) for column in cells.figure.columns)]
        if error is not None:
            row[1] = error
        for column in judged:
            texts = [each.text() for each in verdicts if each.peer == peer and each.goal.column == column.key]
            own, other = cells.median(OURS, column), cells.median(peer, column)
            if not texts and peer not in (OURS, DIRECT) and own is not None and other is not None and other > 0:
                texts = [f"{own / other:.2f}"]
            row.append(", ".join(texts))
        rows.append(row)
    return titles, rows


def foot(cells: Cells) -> list[str]:
    """List what stands under a table: goals that compare with no other proxy, and the figure's note."""
    columns = {column.key: column.title for column in cells.figure.columns}
    lines = [f"ours, {columns[each.goal.column]}: {each.text()}" for each in judge(cells) if each.peer is None]
    return lines + ([cells.figure.note] if cells.figure.note else [])


def as_text(cells: Cells) -> str:
    """Write a figure for a terminal."""
    titles, rows = table(cells)
    # An error takes the place of the numbers and must not widen their column.
    widths = [
        max(len(titles[at]), *(len(row[at]) for row in rows if at != 1 or cells.error(row[0]) is None), 0)
        for at in range(len(titles))
    ]

    def line(row: collections.abc.Sequence[str]) -> str:
        return "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()

    return (
        "\n".join([f"{cells.figure.name}: {cells.figure.title}", line(titles), *map(line, rows), *foot(cells)]) + "\n"
    )


def as_markdown(cells: Cells) -> str:
    """Write a figure for a page."""
    titles, rows = table(cells)
    lines = [f"### {cells.figure.title}", "", "| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
    for text in foot(cells):
        lines += ["", text]
    return "\n".join(lines) + "\n"


def summary(all_cells: collections.abc.Iterable[Cells]) -> str:
    """Count the goals met, and name those that are not."""
    measured = [cells for cells in all_cells if OURS in cells.rounds]
    verdicts = [(cells.figure.name, verdict) for cells in measured for verdict in judge(cells)]
    wrong = [f"  {cells.figure.name}: ours was wrong" for cells in measured if cells.error(OURS) is not None]
    if not verdicts and not wrong:
        return ""
    missed = [
        f"  {name}, {verdict.goal.column}"
        + (f" against {verdict.peer}" if verdict.peer else "")
        + f": {verdict.text()}"
        for name, verdict in verdicts
        if not verdict.met
    ]
    return "\n".join([f"goals met: {len(verdicts) - len(missed)} of {len(verdicts)}", *missed, *wrong])
