"""``scripts/demo``: each story for real, what it prints, its failure where the proxy tells another, what it leaves."""

import collections.abc
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
import xml.etree.ElementTree

import pytest

import netns
from daemons import missing_parts, running
from harness import ROOT, wait_until

sys.path.insert(0, str(ROOT / "scripts"))

from stories import go_proxy  # found by the line above
from stories.causes import STORIES, Story  # as above
from stories.screen import Screen, wants_colour  # as above

DEMO = ROOT / "scripts" / "demo"
_NAMES = [story.name for story in STORIES]
_missing = missing_parts() or netns.why_not()
pytestmark = pytest.mark.timeout(180)
needs_docker = pytest.mark.skipif(_missing is not None, reason=f"no demo here: {_missing}")


def _demo(
    *arguments: str, env: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, str(DEMO), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | (env or {}),
        timeout=170,
        check=False,
    )


@pytest.fixture(scope="module")
def all_stories() -> subprocess.CompletedProcess[str]:
    """All stories in one run."""
    return _demo("all", "--without-go")


def _section(output: str, name: str) -> str:
    """Returns: what was printed of one story."""
    found = re.search(rf"^{name}: .*?(?=^\w+: |^  story +│)", output + "\n  story │", re.MULTILINE | re.DOTALL)
    assert found is not None, output
    return found[0]


def _joined(text: str) -> str:
    """Returns: the text in one line."""
    return " ".join(text.split())


# What each story has to have printed, as text and not as the story's own expectation.
_PRINTED = {
    "deadline": (
        "side client · phase response_body · operation write · cause deadline · status 200",
        '"name": "client_write_deadline", "seconds": 10.0, "source": "flag"',
        "context canceled",
    ),
    "paused": (
        "side client · phase response_body · operation write · cause timeout · status 200",
        '"name": "client_write_timeout", "seconds": 3.0, "source": "flag"',
        "client: paused (",
        "its window closed for",
    ),
    "vanished": (
        "side client · phase response_body ·",
        "cause dead_peer · status 200",
        '"name": "peer_dead_timeout", "seconds": 4.0, "source": "flag"',
        "client: dead (",
        "docker still waits",
        "context canceled",
    ),
    "killed": ("side upstream · phase response_body ·", "kill -9 of dockerd", "as it comes", "with status 1"),
    "hangup": ("side client · phase response_body ·", "Ctrl-C", "as it comes", "SIGINT ended it"),
    "mtu": (
        "side upstream · phase request_body · operation write · cause timeout · status 504",
        '"name": "upstream_write_timeout", "seconds": 5.0, "source": "flag"',
        "docker ps works, while nothing of the image gets through",
        "Error response from daemon:",
    ),
}


@needs_docker
@pytest.mark.parametrize("name", _NAMES)
def test_a_story(all_stories: subprocess.CompletedProcess[str], name: str) -> None:
    assert all_stories.returncode == 0, all_stories.stdout + all_stories.stderr
    section = _section(all_stories.stdout, name)
    for text in _PRINTED[name]:
        assert text in _joined(section), section
    for who in ("docker said", "dockerd said", "abort-proxy said"):
        assert who in section
    assert re.search(r"^  ok  ", section, re.MULTILINE)
    assert "FAILED" not in section


@needs_docker
def test_all_ends_with_a_table(all_stories: subprocess.CompletedProcess[str]) -> None:
    table = all_stories.stdout[all_stories.stdout.index("  story ") :]
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "│" in line]
    assert rows[0] == ["story", "side", "cause", "limit", "docker's last word", "took", "told"]
    told = {row[0]: row for row in rows[1:] if row[0]}
    assert list(told) == _NAMES
    assert {row[6] for row in told.values()} == {"ok"}
    assert [row[1] for row in told.values()] == ["client", "client", "client", "upstream", "client", "upstream"]
    assert told["deadline"][2:4] == ["deadline", "client_write_deadline 10 s (flag)"]
    assert told["mtu"][2:4] == ["timeout", "upstream_write_timeout 5 s (flag)"]
    assert told["killed"][3] == "none"
    for row in told.values():
        assert 0 < float(row[5].removesuffix(" s")) < 60


@needs_docker
def test_piped_output_has_no_colour_and_fits(all_stories: subprocess.CompletedProcess[str]) -> None:
    assert "\x1b" not in all_stories.stdout
    assert max(len(line) for line in all_stories.stdout.splitlines()) <= 116
    assert not [line for line in all_stories.stdout.splitlines() if line != line.rstrip()]


@needs_docker
def test_the_picture_of_the_deadline(tmp_path: pathlib.Path) -> None:
    """With Go's proxy beside ours where Go is at hand, as the picture in the README has it."""
    picture = tmp_path / "deadline.svg"
    go_at_hand = go_proxy.go_at_hand() is not None
    done = _demo("deadline", "--svg", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("Go's ReverseProxy said" in done.stdout) == go_at_hand
    if go_at_hand:
        assert "unexpected EOF" in done.stdout
        assert "(and nothing more)" in done.stdout
    _check_picture(picture.read_text(encoding="utf-8"), done.stdout)


def _check_picture(text: str, printed: str) -> None:
    assert len(text.encode()) < 60_000
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    shown = "".join(element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "".join(printed.split()) in "".join(shown.split())


def test_the_picture_in_the_docs_is_one_of_ours() -> None:
    text = (ROOT / "docs" / "deadline.svg").read_text(encoding="utf-8")
    _check_picture(text, "")
    for words in (
        "unexpected EOF",
        "client_write_deadline",
        "cause deadline",
        "Go's ReverseProxy",
        "context canceled",
    ):
        assert words in text


# -- where the proxy tells another story -------------------------------------------------------------------------------


@needs_docker
def test_a_story_fails_where_the_proxy_tells_another() -> None:
    done = _demo("paused", "--", "--client-write-deadline", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    section = _joined(_section(done.stdout, "paused"))
    assert "FAILED cause is 'deadline' and should be 'timeout'" in section
    assert "limit is ('client_write_deadline', 1.0, 'flag')" in section


@needs_docker
def test_a_story_fails_where_the_proxy_does_not_start(tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "picture.svg"
    done = _demo("hangup", "--svg", str(picture), "--", "--no-such-option", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert "--no-such-option" in done.stdout
    assert not picture.exists()


def _abort_of(story: Story) -> dict[str, typing.Any]:
    """Returns: a record, as far as it is judged, that is right for a story."""
    expected = story.expected
    record: dict[str, typing.Any] = {
        "event": "request.abort",
        "message": "it ended",
        "side": expected.side,
        "phase": expected.phase,
        "cause": expected.causes[0],
        "limit": None,
        "socket": {"client": None, "upstream": None},
    }
    if expected.limit is not None:
        record["limit"] = {"name": expected.limit[0], "seconds": expected.limit[1], "source": "flag"}
    if expected.verdict is not None:
        record["socket"][expected.verdict[0]] = {"verdict": expected.verdict[1][0]}
    return record


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.name)
def test_each_part_of_a_record_is_judged(story: Story) -> None:
    right = _abort_of(story)
    complete = {"event": "request.complete", "message": "done"}
    assert story.expected.differences([complete, right]) == []
    for records in ([], [complete], [right, right], [right, {"event": "request.reject", "message": "no"}]):
        assert len(story.expected.differences(records)) == 1
    changes: dict[str, typing.Any] = {"side": "proxy", "phase": "tunnel", "cause": "internal"}
    changes["limit"] = {"name": "tunnel_timeout", "seconds": 1.0, "source": "flag"}
    for name, value in changes.items():
        assert len(story.expected.differences([right | {name: value}])) == 1, name
    if story.expected.limit is not None:
        for name, value in (("name", "other"), ("seconds", 0.5), ("source", "default")):
            assert len(story.expected.differences([right | {"limit": right["limit"] | {name: value}}])) == 1, name
        assert len(story.expected.differences([right | {"limit": None}])) == 1
    if story.expected.verdict is not None:
        other = right["socket"] | {story.expected.verdict[0]: {"verdict": "moving"}}
        assert len(story.expected.differences([right | {"socket": other}])) == 1


# -- what it leaves ----------------------------------------------------------------------------------------------------


@pytest.fixture
def place() -> collections.abc.Iterator[str]:
    """A directory for all that a demo makes, with a short path: sockets lie below it."""
    made = tempfile.mkdtemp(prefix="d", dir="/tmp")
    yield made
    shutil.rmtree(made)


@needs_docker
@pytest.mark.parametrize(
    ("story", "seen", "number"),
    [
        ("vanished", "docker push ...", signal.SIGINT),
        ("deadline", "starting dockerd", signal.SIGTERM),
        ("paused", "docker save ...", signal.SIGHUP),
    ],
)
def test_an_interrupt_leaves_nothing(place: str, story: str, seen: str, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, str(DEMO), story, "--without-go"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": place},
        start_new_session=True,
    ) as demo:
        assert demo.stderr is not None
        assert any(seen in line for line in demo.stderr)
        if seen.startswith("docker"):
            wait_until(lambda: running(f"{place}/"), what="it is under way")
        groups = [path.name for path in pathlib.Path(place).glob("demo-*/dkr*")]
        # As a terminal does: to the group, and who is impatient presses it twice.
        os.killpg(demo.pid, number)
        time.sleep(0.05)
        os.killpg(demo.pid, number)
        said = demo.stderr.read()
        assert demo.wait(60) == 128 + number, said
    assert said.endswith(f"ended by {number.name}; all that was started is gone\n")
    assert "Traceback" not in said
    assert running(f"{place}/") == []
    assert os.listdir(place) == []
    assert place not in pathlib.Path("/proc/self/mountinfo").read_text()
    namespaces = pathlib.Path("/run/netns")
    assert not list(namespaces.glob(f"proxy-test-{demo.pid}-*"))
    hierarchies = pathlib.Path("/sys/fs/cgroup")
    assert not [name for name in groups if (hierarchies / name).exists() or list(hierarchies.glob(f"*/{name}"))]


# -- where it can't run ------------------------------------------------------------------------------------------------


def test_without_root_it_says_so() -> None:
    # In a user namespace of its own nobody is root, and what only root may read can still be read.
    done = _demo("hangup", prefix=("unshare", "--user") if os.geteuid() == 0 else ())
    assert (done.returncode, done.stdout) == (2, "")
    assert "need root: sudo" in done.stderr


@needs_docker
def test_a_missing_part_is_named_with_its_command(tmp_path: pathlib.Path) -> None:
    hide = f"mount --bind {tmp_path} /usr/sbin && exec"
    prefix = ("unshare", "--mount", "--propagation=private", "sh", "-c", f'{hide} "$@"', "sh")
    done = _demo("deadline", prefix=prefix)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "demo: missing here: docker.io\n  apt install docker.io\n"


@needs_docker
def test_a_directory_for_temporary_files_that_is_too_deep_is_named(tmp_path: pathlib.Path) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    done = _demo("hangup", env={"TMPDIR": str(deep)})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"demo: no room for the paths of sockets below {deep}; set TMPDIR=/tmp\n"


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("deadline", "--with-go", "--without-go")])
def test_bad_usage(arguments: tuple[str, ...]) -> None:
    done = _demo(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: demo" in done.stderr


def test_a_picture_that_can_not_be_written_is_said_at_once(tmp_path: pathlib.Path) -> None:
    done = _demo("hangup", "--svg", str(tmp_path / "missing" / "picture.svg"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "picture.svg" in done.stderr


# -- how it looks ------------------------------------------------------------------------------------------------------


def test_list_and_help() -> None:
    listed = _demo("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == _NAMES
    helped = _demo("--help")
    assert helped.returncode == 0
    for name in (*_NAMES, "--with-go", "--svg", "--list"):
        assert name in helped.stdout


@pytest.mark.parametrize(("no_colour", "coloured"), [(None, True), ("", True), ("1", False)])
def test_colour_on_a_terminal(no_colour: str | None, coloured: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    if no_colour is not None:
        environment["NO_COLOR"] = no_colour
    ours, theirs = os.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(
            [sys.executable, str(DEMO), "--list"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            check=False,
        )
        os.close(theirs)
        assert done.returncode == 0
        assert (b"\x1b[1m" in terminal.read(4096)) == coloured


def test_no_colour_in_a_file(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "out").open("w") as stream:
        assert not wants_colour(stream, {"TERM": "xterm"})


def test_columns_stand_beside_each_other_or_below(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out"
    for width in (60, 116):
        with path.open("w", encoding="utf-8") as stream:
            screen = Screen(stream, width, colour=False)
            long = f"/v1.41/images/{'x' * 90}/push?tag=latest " + "words " * 20
            screen.columns(("a", "b", "c"), ([("plain", " -> one"), ("plain", long)], [], [("bad", "two")]))
        text = path.read_text(encoding="utf-8")
        assert max(len(line) for line in text.splitlines()) <= width
        assert re.sub(r"[\s│]", "", text).count("words") == 20
        assert (" -> one" in text, "two" in text) == (True, True)
        assert (" a " in text.splitlines()[0] and " c" in text.splitlines()[0]) == (width == 116)


def test_a_picture_escapes_and_keeps_columns(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as stream:
        screen = Screen(stream, 80, colour=True)
        screen.line(("plain", "  <a> & b   c"), ("bad", " d"))
    root = xml.etree.ElementTree.fromstring(screen.svg("demo <x>"))
    last = list(root.iter("{http://www.w3.org/2000/svg}text"))[-3:]
    assert [element.text for element in last] == ["<a> & b", "c", "d"]
    first = float(last[0].attrib["x"])
    cell = float(last[0].attrib["textLength"]) / 7
    assert [round((float(element.attrib["x"]) - first) / cell) for element in last] == [0, 10, 12]
