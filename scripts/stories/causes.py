"""The six stories: each plays one way for a request to die, and knows what the proxy has to say of it."""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import typing

import netns
from daemons import Address, Link
from harness import LogRecord, ProxyProcess

from .go_proxy import started
from .stage import Command, Scene, Stage, Told, wait_until

# A push of the heavy image takes 30 s at this rate.
_PUSH_BYTES_PER_S = 800_000
_DEADLINE_S, _READ_LIMIT_S = 10.0, 5.0
_PAUSE_S, _DEAD_S, _STALL_S = 3.0, 4.0, 5.0
# What a tunnel inside a tunnel may leave of 1,500.
_LARGEST_PACKET = 1300


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What the one abort of a story has to say."""

    side: str
    phase: str
    causes: tuple[str, ...]
    limit: tuple[str, float] | None = None  # name and seconds; its source is the command line
    verdict: tuple[str, tuple[str, ...]] | None = None  # a side, and what the kernel may say of it

    def differences(self, records: collections.abc.Sequence[LogRecord]) -> list[str]:
        """Returns: how the records differ from that, in words."""
        aborts = [record for record in records if record["event"] == "request.abort"]
        others = [record["message"] for record in records if record["event"] == "request.reject"]
        if len(aborts) != 1 or others:
            told = [record["message"] for record in aborts] + others
            return [f"one request.abort should have been told, and there are {len(aborts)}: {told}"]
        abort = aborts[0]
        limit = abort["limit"] or {}
        found: dict[str, tuple[object, tuple[object, ...]]] = {
            "side": (abort["side"], (self.side,)),
            "phase": (abort["phase"], (self.phase,)),
            "cause": (abort["cause"], self.causes),
            "limit": (
                (limit.get("name"), limit.get("seconds"), limit.get("source")) if limit else None,
                ((*self.limit, "flag") if self.limit else None,),
            ),
        }
        if self.verdict is not None:
            side, verdicts = self.verdict
            evidence = abort["socket"][side] or {}
            found[f"the kernel's verdict on the {side}"] = (evidence.get("verdict"), verdicts)
        return [
            f"{what} is {was!r} and should be {' or '.join(repr(v) for v in allowed)}"
            for what, (was, allowed) in found.items()
            if was not in allowed
        ]


Check = tuple[bool, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Story:
    """One way for a request to die."""

    name: str
    summary: str
    setting: str  # what is going to happen
    lesson: str  # what to look at, and what to do about it
    expected: Expected
    options: tuple[str, ...]  # of the proxy
    play: collections.abc.Callable[["Story", Stage], Told]
    checks: collections.abc.Callable[[Told], list[Check]]
    needs_network: bool = False
    needs_registry: bool = False


def _message_printed(told: Told) -> Check:
    said = " ".join(told.docker_said)
    return all(abort["message"] in said for abort in told.aborts), "docker printed the proxy's reason"


def _failed(told: Told) -> Check:
    return told.commands[0].process.returncode not in (0, None), "the command failed"


def _canceled(told: Told) -> Check:
    return any("context canceled" in line for line in told.dockerd_said), "dockerd stopped pushing"


def _tell(story: Story, stage: Stage, scene: Scene, proxy: ProxyProcess) -> Told:
    return scene.tell(proxy, "abort-proxy", " ".join(stage.options(story.options)) or "as it comes")


def _tcp(proxy: ProxyProcess) -> Address:
    address = proxy.address
    assert isinstance(address, tuple)
    return Address(None, *address)


# -- deadline ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _slow_registry(stage: Stage) -> collections.abc.Iterator[tuple[Link, str]]:
    """Yields: the link to the registry, and the name that the heavy image is to be pushed under."""
    stage.dockerd()
    with Link(stage.registry().address, _PUSH_BYTES_PER_S) as slow:
        repository = f"127.0.0.1:{slow.address.port}/heavy"
        stage.docker("tag", stage.image(heavy=True), repository)
        yield slow, repository


def _deadline(story: Story, stage: Stage) -> Told:
    with (
        _slow_registry(stage) as (_, repository),
        stage.proxy(stage.dockerd().tcp.url, *stage.options(story.options)) as proxy,
        Scene(stage, _tcp(proxy)) as scene,
    ):
        if scene.start("push", repository).wait_end():
            scene.await_dockerd("context canceled")
        return _tell(story, stage, scene, proxy)


def play_with_go(stage: Stage, program: pathlib.Path) -> Told:
    """Push the same image in the same way through Go's proxy, under the same limit."""
    log_path = stage.directory / f"go-{stage.number()}.log"
    with (
        _slow_registry(stage) as (_, repository),
        started(
            program, stage.dockerd().tcp, log_path, read_limit_s=_READ_LIMIT_S, write_limit_s=_DEADLINE_S
        ) as go_proxy,
        Scene(stage, go_proxy.address) as scene,
    ):
        scene.start("push", repository).wait_end()
        scene.await_dockerd("context canceled")
        limits = f"ReadTimeout {_READ_LIMIT_S:g} s, WriteTimeout {_DEADLINE_S:g} s"
        return scene.tell(None, "Go's ReverseProxy", limits, go_proxy.stop())


def check_go(told: Told) -> list[Check]:
    """What makes the story worth telling: Go's proxy ends the push, and nobody says why."""
    return [
        (told.docker_said[-1:] == ("unexpected EOF",), "Go: docker's last word was 'unexpected EOF'"),
        (any("context canceled" in line for line in told.dockerd_said), "Go: dockerd said 'context canceled'"),
        (all("request start" in line for line in told.proxy_said), "Go: the proxy said nothing of the end"),
    ]


# -- paused ------------------------------------------------------------------------------------------------------------

# Reads a little and stops, as a pager does, or a program that was suspended.
_READER = "head -c 1000000 >/dev/null; kill -STOP $$; cat >/dev/null"


def _paused(story: Story, stage: Stage) -> Told:
    image = stage.image(heavy=True)
    with (
        stage.proxy(stage.dockerd().unix.url, *stage.options(story.options)) as proxy,
        Scene(stage, _tcp(proxy)) as scene,
    ):
        command = scene.start("save", image, reader=_READER)
        assert command.process.stdout is not None
        with command.process.stdout as pipe:
            reader = subprocess.Popen(["sh", "-c", _READER], stdin=pipe, start_new_session=True)
        try:
            wait_until(lambda: _state(reader.pid) == "T", "the reader, stopped,")
            scene.note("the reader has stopped reading")
            scene.await_abort(proxy)
            # Only one that reads on can learn of it.
            reader.send_signal(signal.SIGCONT)
            scene.note("it reads on")
            command.wait_end()
        finally:
            reader.kill()
            reader.wait(10)
        return _tell(story, stage, scene, proxy)


def _state(pid: int) -> str:
    """Returns: a process's state as a letter; T is stopped."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0]


# -- vanished ----------------------------------------------------------------------------------------------------------


def _vanished(story: Story, stage: Stage) -> Told:
    # The proxy reaches dockerd by its unix socket, for which namespaces of the network are none.
    with (
        stage.network() as network,
        _slow_registry(stage) as (slow, repository),
        stage.proxy(
            stage.dockerd().unix.url, *stage.options(story.options), listen=f"{netns.HERE_IP}:0", namespace=network.here
        ) as proxy,
        Scene(stage, _tcp(proxy), network.there) as scene,
    ):
        command = scene.start("push", repository)
        wait_until(lambda: command.ended() or slow.forwarded_bytes > 2_000_000, "2 MB pushed")
        network.drop()
        scene.note("the firewall starts to drop all packets between docker and the proxy")
        scene.await_abort(proxy)
        scene.await_dockerd("context canceled")
        if not command.ended():
            scene.note("docker still waits, and has not heard of anything; it is killed")
        scene.end_commands()
        network.restore()  # so that the proxy's own end waits for no packet
        return _tell(story, stage, scene, proxy)


# -- killed, hangup ----------------------------------------------------------------------------------------------------


def _build(scene: Scene, stage: Stage) -> Command:
    """Start a build that has no end of its own. Returns: it, in the middle of its step or ended by something else."""
    context = stage.context("RUN echo compiling for hours; sleep 600")
    command = scene.start("build", "--network", "none", str(context))
    command.wait_for("\ncompiling for hours")
    return command


def _killed(story: Story, stage: Stage) -> Told:
    stage.image(heavy=False)
    with (
        stage.proxy(stage.dockerd().unix.url, *stage.options(story.options)) as proxy,
        Scene(stage, _tcp(proxy)) as scene,
    ):
        command = _build(scene, stage)
        scene.note("kill -9 of dockerd")
        stage.kill_dockerd()
        command.wait_end()
        scene.await_abort(proxy)
        return _tell(story, stage, scene, proxy)


_STOPPED = "dockerd has stopped the build and its container"


def _hangup(story: Story, stage: Stage) -> Told:
    stage.image(heavy=False)
    with (
        stage.proxy(stage.dockerd().unix.url, *stage.options(story.options)) as proxy,
        Scene(stage, _tcp(proxy)) as scene,
    ):
        command = _build(scene, stage)
        scene.note("Ctrl-C")
        with contextlib.suppress(ProcessLookupError):  # ended by something else
            os.kill(command.process.pid, signal.SIGINT)
        command.wait_end()
        scene.await_abort(proxy)
        if scene.await_no_container():
            scene.note(_STOPPED)
        return _tell(story, stage, scene, proxy)


# -- mtu ---------------------------------------------------------------------------------------------------------------


def _mtu(story: Story, stage: Stage) -> Told:
    dockerd = stage.dockerd()
    with stage.network() as network:
        with netns.inside(network.there):
            far_end = Link(dockerd.unix, host=netns.THERE_IP)
        with (
            far_end,
            stage.proxy(far_end.address.url, *stage.options(story.options), namespace=network.here) as proxy,
            Scene(stage, _tcp(proxy), network.here) as scene,
        ):
            network.narrow(_LARGEST_PACKET)
            command = scene.start("load", "--input", str(stage.tar()))
            wait_until(lambda: command.ended() or command.so_far_s() > 2.0, "a moment of the load")
            if scene.start("ps", "--quiet").wait_end() == 0:
                scene.note("docker ps works, while nothing of the image gets through")
            command.wait_end()
            scene.await_abort(proxy)
            return _tell(story, stage, scene, proxy)


def _evidence(told: Told, side: str) -> dict[str, typing.Any]:
    """Returns: what the kernel knew, of the one abort; nothing where there is not one."""
    if len(told.aborts) != 1:
        return {}
    evidence: dict[str, typing.Any] = told.aborts[0]["socket"][side] or {}
    return evidence


STORIES = (
    Story(
        "deadline",
        "a forgotten write deadline kills a push over a slow link",
        "docker pushes 24 MB to a registry that takes 0.8 MB/s. Nothing is wrong with anybody; but whoever set the"
        f" proxy up gave it a write deadline of {_DEADLINE_S:g} s, long ago.",
        "A deadline runs on whatever progress is made: it bounds the size of a push by the speed of the network. Remove"
        " it, and use a timeout, which is time without progress.",
        Expected("client", "response_body", ("deadline",), ("client_write_deadline", _DEADLINE_S)),
        ("--client-read-deadline", f"{_READ_LIMIT_S:g}", "--client-write-deadline", f"{_DEADLINE_S:g}"),
        _deadline,
        lambda told: [_failed(told), _message_printed(told), _canceled(told)],
        needs_registry=True,
    ),
    Story(
        "paused",
        "a client stops reading, and a write timeout ends it",
        "docker save writes into a pipe whose reader has stopped, as in a pager that nobody scrolls. The proxy allows"
        f" {_PAUSE_S:g} s without progress.",
        "paused: the client's kernel is there and answers, with its window closed for all of that time. So it is the"
        " program, not the network. By default such a reader may pause for as long as it likes.",
        Expected("client", "response_body", ("timeout",), ("client_write_timeout", _PAUSE_S), ("client", ("paused",))),
        ("--client-write-timeout", f"{_PAUSE_S:g}"),
        _paused,
        lambda told: [
            _failed(told),
            (_evidence(told, "client").get("rwnd_limited_s", 0) > 1, "the kernel knew its window closed for seconds"),
        ],
    ),
    Story(
        "vanished",
        "a firewall starts to drop packets in mid-push",
        "docker pushes through a firewall that forgets the connection: from then on all packets vanish, and nobody is"
        f" told. The proxy takes a peer for dead whose kernel answers nothing for {_DEAD_S:g} s (60 by default).",
        "dead: sent again and again, and not one answer. docker will wait for minutes; dockerd was told at once and"
        " stopped pushing for nobody. Look at what is between the two.",
        Expected("client", "response_body", ("dead_peer",), ("peer_dead_timeout", _DEAD_S), ("client", ("dead",))),
        ("--peer-dead-timeout", f"{_DEAD_S:g}"),
        _vanished,
        lambda told: [
            _canceled(told),
            (_evidence(told, "client").get("unacked_bytes", 0) > 0, "the kernel had bytes that nobody acknowledged"),
        ],
        needs_network=True,
        needs_registry=True,
    ),
    Story(
        "killed",
        "dockerd dies in the middle of a build",
        "docker builds, and dockerd is killed, as by the kernel when memory runs out. The proxy has no limit set.",
        "Upstream's side, without a limit: dockerd itself went away. Look at its machine: dmesg, memory, disk.",
        Expected("upstream", "response_body", ("closed", "reset")),
        (),
        _killed,
        lambda told: [_failed(told), _message_printed(told)],
    ),
    Story(
        "hangup",
        "Ctrl-C on a build",
        "docker builds, and its user presses Ctrl-C. The proxy has no limit set.",
        "The client's side, without a limit: it left. Nothing to mend; dockerd was told and stopped building.",
        Expected("client", "response_body", ("closed", "reset")),
        (),
        _hangup,
        lambda told: [_failed(told), (any(_STOPPED in note for note in told.notes), "dockerd stopped building")],
    ),
    Story(
        "mtu",
        "small packets pass, bulk stalls",
        f"Between the proxy and dockerd is a tunnel in which packets over {_LARGEST_PACKET:,} octets vanish, and no"
        f" ICMP says so. The proxy allows {_STALL_S:g} s without progress.",
        "Sent again and again without an answer, while another connection to the same dockerd works: bulk dies and"
        " small packets pass. Compare the MTUs of the way (tracepath), or clamp the MSS.",
        Expected(
            "upstream",
            "request_body",
            ("timeout",),
            ("upstream_write_timeout", _STALL_S),
            ("upstream", ("dead", "slow_network")),
        ),
        ("--upstream-write-timeout", f"{_STALL_S:g}"),
        _mtu,
        lambda told: [
            _failed(told),
            _message_printed(told),
            (told.commands[-1].process.returncode == 0, "docker ps worked meanwhile"),
            (_evidence(told, "upstream").get("retransmits", 0) > 0, "the kernel sent again and again"),
        ],
        needs_network=True,
    ),
)
