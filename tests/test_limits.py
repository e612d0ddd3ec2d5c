"""Which limit of one direction runs out first, after how long, and how limits are named."""

import pytest

from proxy.limits import Bound, Limit, Watch, spell_source

TIMEOUT = Limit("client_read_timeout", 2.0, "flag")
DEADLINE = Limit("client_read_deadline", 5.0, "default")


def test_a_watch_that_nobody_has_started_has_no_end() -> None:
    for watch in (Watch(TIMEOUT, DEADLINE), Watch(None, None)):
        assert watch.due_at() is None
        assert watch.expired(1e9) is None
    nothing = Watch(None, None)
    nothing.start(1.0)
    nothing.wait(1.0)
    assert nothing.due_at() is None
    assert nothing.expired(1e9) is None


def test_a_timeout_counts_while_its_event_is_waited_for() -> None:
    watch = Watch(TIMEOUT, None)
    watch.progress(1.0)  # of an octet that was not waited for
    assert watch.due_at() is None
    watch.wait(10.0)
    watch.wait(11.0)  # goes on
    assert watch.due_at() == 12.0
    assert watch.expired(11.9) is None
    assert watch.expired(12.0) == (TIMEOUT, 2.0)
    assert watch.expired(12.5) == (TIMEOUT, 2.5)
    watch.progress(11.5)
    assert watch.due_at() == 13.5
    assert watch.expired(13.0) is None
    watch.rest()
    assert watch.due_at() is None
    assert watch.expired(100.0) is None
    watch.wait(20.0)
    assert watch.due_at() == 22.0


def test_a_deadline_runs_from_its_start_whatever_happens() -> None:
    watch = Watch(None, DEADLINE)
    watch.start(10.0)
    watch.wait(11.0)
    watch.progress(12.0)
    watch.rest()
    assert watch.due_at() == 15.0
    assert watch.expired(14.9) is None
    assert watch.expired(15.0) == (DEADLINE, 5.0)
    assert watch.expired(17.0) == (DEADLINE, 7.0)


@pytest.mark.parametrize(
    ("waits_from", "due_at", "first"),
    [(12.0, 14.0, (TIMEOUT, 6.0)), (13.0, 15.0, (TIMEOUT, 5.0)), (14.0, 15.0, (DEADLINE, 8.0))],
    ids=["the timeout", "both at once", "the deadline"],
)
def test_of_two_that_have_run_out_the_first_counts(
    waits_from: float, due_at: float, first: tuple[Limit, float]
) -> None:
    """Both at once: the timeout, which says more about the peer."""
    watch = Watch(TIMEOUT, DEADLINE)
    watch.start(10.0)
    watch.wait(waits_from)
    assert watch.due_at() == due_at
    assert watch.expired(18.0) == first


def test_one_of_two_that_has_not_run_out_does_not_hide_the_other() -> None:
    watch = Watch(TIMEOUT, DEADLINE)
    watch.start(10.0)
    watch.wait(12.5)
    assert watch.expired(14.75) == (TIMEOUT, 2.25)
    watch.progress(14.5)
    assert watch.due_at() == 15.0
    assert watch.expired(15.5) == (DEADLINE, 5.5)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("default", "by default"),
        ("flag", "set by flag"),
        ("env:PROXY_MAX_BODY_SIZE", "set by environment variable PROXY_MAX_BODY_SIZE"),
        ("file:/etc/proxy.toml:3", "set in /etc/proxy.toml line 3"),
        ("file:/etc/a:b.toml:12", "set in /etc/a:b.toml line 12"),
    ],
)
def test_a_limit_says_where_it_was_set(source: str, words: str) -> None:
    assert spell_source(source) == words
    assert str(Limit("keepalive_timeout", 0.25, source)) == f"keepalive_timeout (0.25 s, {words})"
    assert str(Bound("max_body_size", 1048576, source)) == f"max_body_size (1,048,576, {words})"
