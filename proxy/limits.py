"""Limits with the place where each was set, and the watch that says which of them runs out first.

A limit is a number that knows its name and its source, so that a record can say which forgotten setting ended a
request. Time is always passed in: no clock is read here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limit:
    """A length of time that bounds a wait or a transfer. A limit that is off is None, never 0 or infinity."""

    name: str  # the option: "client_write_timeout"
    seconds: float  # > 0
    source: str  # "default", "file:PATH:LINE", "env:NAME" or "flag"

    def __str__(self) -> str:
        return f"{self.name} ({self.seconds:g} s, {spell_source(self.source)})"


@dataclasses.dataclass(frozen=True, slots=True)
class Bound:
    """A size or a number that must not be passed. A bound that is off is None."""

    name: str  # the option: "max_body_size"
    value: int
    source: str  # as in Limit

    def __str__(self) -> str:
        return f"{self.name} ({self.value:,}, {spell_source(self.source)})"


def spell_source(source: str) -> str:
    """Say where a value was set, as the end of a sentence: ``set by flag``, ``by default``, ``set in FILE line 3``."""
    kind, _, place = source.partition(":")
    match kind:
        case "default":
            return "by default"
        case "file":
            path, _, line = place.rpartition(":")
            return f"set in {path} line {line}"
        case "env":
            return f"set by environment variable {place}"
        case _:
            return f"set by {source}"


class Watch:
    """Joins the timeout and the deadline of one direction of one socket.

    The timeout counts only between ``wait`` and ``rest``, that is while the loop polls for that event: under
    back-pressure the proxy stops asking the fast side, whose clock must not run on. A deadline runs from ``start`` to
    ``end`` whatever happens.
    """

    __slots__ = ("deadline", "deadline_from", "stalled_from", "timeout")

    def __init__(self, timeout: Limit | None, deadline: Limit | None) -> None:
        self.timeout = timeout
        self.deadline = deadline
        self.stalled_from: float | None = None
        self.deadline_from: float | None = None

    def start(self, now: float) -> None:
        """Let the deadline run from ``now``."""
        self.deadline_from = now

    def wait(self, now: float) -> None:
        """The loop begins to poll for this direction; a wait already under way goes on."""
        if self.stalled_from is None:
            self.stalled_from = now

    def rest(self) -> None:
        """The loop no longer polls for this direction: the timeout stands still and starts anew."""
        self.stalled_from = None

    def end(self) -> None:
        """All that was to pass this way has passed, or is not wanted any more: neither limit runs on."""
        self.stalled_from = self.deadline_from = None

    def progress(self, now: float) -> None:
        """A byte moved (or was acknowledged): a wait under way starts anew."""
        if self.stalled_from is not None:
            self.stalled_from = now

    def due_at(self) -> float | None:
        """Returns: the point on the monotonic clock when the first of both runs out, None if neither runs."""
        due = None
        if self.deadline is not None and self.deadline_from is not None:
            due = self.deadline_from + self.deadline.seconds
        if self.timeout is not None and self.stalled_from is not None:
            timeout_at = self.stalled_from + self.timeout.seconds
            if due is None or timeout_at <= due:
                due = timeout_at
        return due

    def expired(self, now: float) -> tuple[Limit, float] | None:
        """Returns: the limit that ran out first and the seconds it ran for; the timeout on a tie, as it says more."""
        over: tuple[float, Limit, float] | None = None
        if (
            self.timeout is not None
            and self.stalled_from is not None
            and now >= self.stalled_from + self.timeout.seconds
        ):
            over = (self.stalled_from + self.timeout.seconds, self.timeout, now - self.stalled_from)
        if self.deadline is not None and self.deadline_from is not None:
            deadline_at = self.deadline_from + self.deadline.seconds
            if now >= deadline_at and (over is None or deadline_at < over[0]):
                over = (deadline_at, self.deadline, now - self.deadline_from)
        return None if over is None else (over[1], over[2])
