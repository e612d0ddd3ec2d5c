"""The command line of scripts/bench: what to measure, the rounds, and the tables at the end."""

import argparse
import json
import os
import pathlib
import signal
import statistics
import sys
import time
import types

import dependencies  # beside scripts/bench

from .figures import Figure, all_figures
from .machine import Disturbance, Processes, describe_machine, raise_file_limit
from .peers import PEERS
from .picture import as_svg
from .report import DIRECT, OURS, Cells, as_markdown, as_text, summary
from .stage import FULL, QUICK, CellError, Stage
from .tools import MissingTool, find, say, tell_commit, version

QUICK_FIGURES = ("small-16", "bulk-down", "chunked-down", "trickle")
# A cell during which others used more of a core than this is measured again.
QUIET = 0.10
QUICK_PEERS = (DIRECT, OURS, "go", "nginx")


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Compare the CPU time, speed and delay of this proxy with others on this machine.",
        epilog="Proxies: " + "; ".join(f"{peer.name}: {peer.note or peer.name}" for peer in PEERS.values()),
    )
    names = ", ".join(all_figures(FULL))
    parser.add_argument("--quick", action="store_true", help="a few figures and proxies, in under a minute")
    parser.add_argument("--figures", metavar="NAMES", help=f"with commas, a name or its first part: {names}")
    parser.add_argument("--peers", metavar="NAMES", help=f"with commas: {', '.join(PEERS)}; direct always runs")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often (3; with --quick 2)")
    parser.add_argument("--markdown", action="store_true", help="tables for a page")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write every single value")
    parser.add_argument("--svg", type=pathlib.Path, metavar="FILE", help="also draw what each proxy costs")
    return parser.parse_args(arguments)


def _chosen_figures(words: list[str] | None, figures: dict[str, Figure]) -> list[Figure]:
    if words is None:
        return list(figures.values())
    chosen = []
    for word in words:
        found = [figure for name, figure in figures.items() if name == word or name.startswith(word + "-")]
        if not found:
            raise SystemExit(f"bench: no figure {word}; there are {', '.join(figures)}")
        chosen += found
    return chosen


def _chosen_peers(words: list[str]) -> list[str]:
    """Check the proxies' names, install what they need, and leave out what cannot run here."""
    if unknown := [word for word in words if word not in PEERS]:
        raise SystemExit(f"bench: no proxy {', '.join(unknown)}; there are {', '.join(PEERS)}")
    chosen = [DIRECT]
    for name in PEERS:
        if name not in words or name == DIRECT:
            continue
        program = PEERS[name].program
        try:
            if program is not None:
                find(program)
        except MissingTool as error:
            say(f"without {name}: {error}")
            continue
        chosen.append(name)
    return chosen


def _describe(peers: list[str]) -> str:
    """Name the machine and the versions of everything that takes part, in one line."""
    programs = {"wrk": None, "nginx": None, "go": None} | {PEERS[name].program: None for name in peers}
    versions = [version(program) for program in programs if program is not None]
    own = [f"ours {tell_commit()}"] if OURS in peers else []
    return "; ".join([describe_machine(), *own, *versions])


def _measure_quietly(stage: Stage, figure: Figure, name: str) -> tuple[dict[str, float] | str, float]:
    """Measure a cell, again if others used the machine. Returns: the least disturbed outcome, and how disturbed."""
    attempts: list[tuple[float, dict[str, float] | str]] = []
    while True:
        disturbance = Disturbance()
        try:
            outcome: dict[str, float] | str = figure.run(stage, PEERS[name])
        except CellError as error:
            outcome = str(error)
            stage.drop(PEERS[name])
        attempts.append((disturbance.share(), outcome))
        share, outcome = min(attempts, key=lambda attempt: attempt[0])
        if share <= QUIET or len(attempts) == stage.scale.attempts:
            break
        say(f"{figure.name}, {name}: others use {attempts[-1][0]:.0%} of a core; once more")
        time.sleep(2)
    if isinstance(outcome, str):
        say(f"{figure.name}, {name}: {outcome}")
    return outcome, share


def _measure(
    stage: Stage, figures: list[Figure], peers: list[str], rounds: int, cells: dict[str, Cells], shares: list[float]
) -> None:
    """Run all rounds. Every round has each proxy once per figure, and begins with another one than the last.

    shares: gets how much of a core others used, cell by cell.
    """
    for turn in range(rounds):
        for figure in figures:
            say(f"round {turn + 1} of {rounds}: {figure.name}")
            # direct goes in its own place: it tells whether the machine was quiet, as the others do.
            taking_part = [name for name in peers if figure.direct or name != DIRECT]
            start = turn % max(1, len(taking_part))
            outcomes: dict[str, dict[str, float] | str] = {}
            for name in taking_part[start:] + taking_part[:start]:
                outcomes[name], disturbance = _measure_quietly(stage, figure, name)
                shares.append(disturbance)
            for name in taking_part:
                cells[figure.name].add(name, outcomes[name])


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str]) -> int:
    """Measure and print. Returns: 0, or 1 if a cell was wrong, or 130 if interrupted (with the tables so far)."""
    options = _parse(arguments)
    dependencies.start_anew_if_missing()
    scale = QUICK if options.quick else FULL
    words = options.figures.split(",") if options.figures else (list(QUICK_FIGURES) if options.quick else None)
    figures = _chosen_figures(words, all_figures(scale))
    names = options.peers.split(",") if options.peers else list(QUICK_PEERS if options.quick else PEERS)
    rounds = options.rounds or (2 if options.quick else 3)
    signal.signal(signal.SIGTERM, _interrupt)
    raise_file_limit()
    processes = Processes()
    interrupted = False
    shares: list[float] = []
    cells = {figure.name: Cells(figure) for figure in figures}
    try:
        peers = _chosen_peers(names)
        heading = _describe(peers)
        stage = Stage(scale, processes)
        try:
            _measure(stage, figures, peers, rounds, cells, shares)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            # A second Ctrl-C must not leave proxies behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            stage.close()
    except MissingTool as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        processes.end_all()
        return 130
    measured = [each for each in cells.values() if each.rounds]
    sys.stdout.write(f"{heading}\n{_conditions(stage, rounds, shares)}\n\n")
    for each in measured:
        sys.stdout.write((as_markdown(each) if options.markdown else as_text(each)) + "\n")
    sys.stdout.write(summary(measured) + "\n")
    if options.json is not None:
        raw = {"heading": heading, "figures": {each.figure.name: each.rounds for each in measured}}
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    if options.svg is not None:
        options.svg.write_text(as_svg(measured, heading.split(", CPython", 1)[0]))
    if interrupted:
        return 130
    return 1 if any(each.error(name) for each in measured for name in each.rounds) else 0


def _conditions(stage: Stage, rounds: int, shares: list[float]) -> str:
    """Tell under which conditions the numbers came about."""
    shared = shares or [0.0]
    text = f"{rounds} interleaved rounds, median (least to most)."
    text += f" Load clients and upstream share the {os.cpu_count()} cores."
    text += f" Other processes used {statistics.median(shared):.0%} of a core, at most {max(shared):.0%}."
    return text + (f" TLS: {', '.join(sorted(stage.ciphers))}." if stage.ciphers else "")
