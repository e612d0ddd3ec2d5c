"""What the stories play on: a dockerd, a registry, images, networks; a scene, and what was said in it.

All of it is started when a story first asks for it and ended by ``Stage.close``. Whatever is made lies below one
directory, and nothing of the machine's own docker or network is touched.
"""

import collections.abc
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import typing

import netns
from daemons import Address, DockerCli, Dockerd, Registry, clean_environment, processes, write_image_tar
from harness import LogRecord, ProxyProcess, check_record

# More than all buffers on the way from dockerd to a reader that has stopped: 6 MB of a receiver's and 4 of a sender's.
HEAVY_BYTES = 24_000_000
# Bounds for what is waited for, not lengths of anything: an emulated machine is slow.
PATIENCE_S = 90.0


def say(text: str) -> None:
    """Tell on stderr what is going on: it is no part of the output."""
    sys.stderr.write(f"demo: {text}\n")
    sys.stderr.flush()


def wait_until(condition: collections.abc.Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait for a condition that no event announces, leaving the machine to those who are to bring it about.

    Raises: AssertionError.
    """
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, f"{what} did not come about in {within_s:g} s"
        time.sleep(0.05)


class Command:
    """A docker command under way, its output in a file."""

    def __init__(self, shown: str, output: pathlib.Path, process: subprocess.Popen[bytes]) -> None:
        self.shown = shown
        self.process = process
        self._output = output
        self.began_at = time.monotonic()
        self.took_s: float | None = None  # known when it has ended
        self.killed = False  # it had not ended by itself

    def text(self) -> str:
        """Returns: what it has printed so far, both of its outputs."""
        return self._output.read_text("utf-8", "replace")

    def so_far_s(self) -> float:
        """Returns: how long ago it began."""
        return time.monotonic() - self.began_at

    def ended(self) -> bool:
        """Whether it has ended; the first time this is seen is taken for its end."""
        if self.process.poll() is None:
            return False
        if self.took_s is None:
            self.took_s = self.so_far_s()
        return True

    def wait_for(self, text: str) -> bool:
        """Wait until it has printed some text. Returns: False if it ended before."""
        wait_until(lambda: self.ended() or text in self.text(), f"{text!r} from {self.shown}")
        return text in self.text()

    def wait_end(self) -> int:
        """Wait for its end. Returns: its status."""
        wait_until(self.ended, f"the end of {self.shown}")
        status: int = self.process.returncode
        return status

    def kill(self) -> None:
        """End it, if it has not ended by itself."""
        if not self.ended():
            self.killed = True
            self.process.kill()
            self.process.wait(10)
            self.ended()


class Stage:
    """What the stories of one run share."""

    def __init__(self, cli: DockerCli, python: str, more_options: tuple[str, ...], directory: pathlib.Path) -> None:
        self.cli = cli
        self.directory = directory
        self._more_options = more_options
        self._python = python
        self._stack = contextlib.ExitStack()
        self._dockerd: Dockerd | None = None
        self._registry: Registry | None = None
        self._images: set[str] = set()  # of the present dockerd
        self._count = 0

    def close(self) -> None:
        """End everything."""
        try:
            self._stack.close()
        finally:
            sweep()

    def dockerd(self) -> Dockerd:
        """Returns: the daemon; another one if the last was killed."""
        if self._dockerd is None:
            say("starting dockerd")
            self._dockerd = self._stack.enter_context(Dockerd())
            self._images.clear()
        return self._dockerd

    def kill_dockerd(self) -> None:
        """Kill the daemon, as ``kill -9`` does."""
        assert self._dockerd is not None
        self._dockerd.kill()
        self._dockerd = None

    def registry(self) -> Registry:
        """Returns: the registry."""
        if self._registry is None:
            say("starting a registry")
            self._registry = self._stack.enter_context(Registry())
        return self._registry

    def image(self, *, heavy: bool) -> str:
        """Returns: an image with busybox, and if it shall be heavy, with much content that nothing can compress."""
        name = "heavy" if heavy else "small"
        if name not in self._images:
            say(f"making the image {name!r}")
            tar = self.tar() if heavy else self.directory / "small.tar"
            if not heavy:
                write_image_tar(tar, busybox=True, blob_bytes=0)
            self.docker("import", str(tar), name)
            self._images.add(name)
        return name

    def tar(self) -> pathlib.Path:
        """Returns: the file that the heavy image is made of."""
        tar = self.directory / "heavy.tar"
        if not tar.exists():
            write_image_tar(tar, busybox=True, blob_bytes=HEAVY_BYTES)
        return tar

    def context(self, *steps: str) -> pathlib.Path:
        """Returns: a directory to build the small image with some further steps from."""
        context = self.directory / f"context-{self.number()}"
        context.mkdir()
        (context / "Dockerfile").write_text("\n".join((f"FROM {self.image(heavy=False)}", *steps)) + "\n")
        return context

    def number(self) -> int:
        """Returns: another number at each call."""
        self._count += 1
        return self._count

    def docker(self, *arguments: str) -> str:
        """Run a docker command past the proxy. Returns: what it printed. Raises: RuntimeError."""
        command = self.cli.command(self.dockerd().unix, *arguments)
        done = subprocess.run(command, capture_output=True, text=True, env=_cli_environment(), check=False)
        if done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def options(self, of_story: tuple[str, ...]) -> tuple[str, ...]:
        """Returns: the proxy's options: those of a story, in pairs, where nobody has named another value, and these."""
        named = {option.partition("=")[0] for option in self._more_options}
        pairs = zip(of_story[::2], of_story[1::2], strict=True)
        return (*(part for name, value in pairs if name not in named for part in (name, value)), *self._more_options)

    def network(self) -> contextlib.AbstractContextManager[netns.Network]:
        """Returns: two network namespaces with a link between them, for one scene."""
        say("making two network namespaces")
        return netns.Network()

    @contextlib.contextmanager
    def proxy(
        self, upstream: str, *options: str, listen: str = "127.0.0.1:0", namespace: str | None = None
    ) -> collections.abc.Iterator[ProxyProcess]:
        """Run the single file of the proxy."""
        say("starting the proxy")
        with ProxyProcess(
            upstream,
            *options,
            form="single_file",
            listen=listen,
            python=self._python,
            namespace=namespace,
        ) as proxy:
            yield proxy


def _cli_environment() -> dict[str, str]:
    # The classic builder: BuildKit cancels in another way (docs/origin.md), and newer clients lack it without a plugin.
    return clean_environment(DOCKER_BUILDKIT="0", DOCKER_CONFIG="/nonexistent")


def sweep() -> None:
    """End what an interrupt caught on its way from being made to being owned: children, namespaces."""
    for pid, parent, _ in list(processes()):
        if parent == os.getpid():
            with contextlib.suppress(ProcessLookupError):  # has ended just now
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # was waited for by somebody else
                os.waitpid(pid, 0)
    left = pathlib.Path("/run/netns")
    for path in left.glob(f"proxy-test-{os.getpid()}-*") if left.is_dir() else ():
        subprocess.run(["ip", "netns", "delete", path.name], capture_output=True, check=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Told:
    """What everybody said in one scene, when it is over."""

    who: str  # the proxy's name
    how: str  # and how it was started
    commands: tuple[Command, ...]  # the first is what the scene is about
    notes: tuple[str, ...]  # what was done from outside, and when
    docker_said: tuple[str, ...]
    dockerd_said: tuple[str, ...]
    proxy_said: tuple[str, ...]  # Go's; ours has records
    records: tuple[LogRecord, ...]

    @property
    def aborts(self) -> list[LogRecord]:
        """Returns: the records of what was neither complete nor rejected."""
        return [record for record in self.records if record["event"] == "request.abort"]


class Scene:
    """One command, or some, through one proxy, and the notes of what was done to them. Leaving it ends them."""

    def __init__(self, stage: Stage, address: Address, namespace: str | None = None) -> None:
        self._stage = stage
        self._address = address
        self._namespace = namespace  # where the client is
        self._dockerd = stage.dockerd()
        self._said_before = len(self._dockerd.log())
        self._commands: list[Command] = []
        self._notes: list[str] = []

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_commands()

    def await_no_container(self) -> bool:
        """Wait until no container runs, for a while. Returns: whether that is so."""
        try:
            wait_until(lambda: not self._stage.docker("ps", "--quiet"), "the containers' end", 30.0)
        except AssertionError:
            return False
        return True

    def end_commands(self) -> None:
        """Kill what still runs."""
        for command in self._commands:
            command.kill()

    def start(self, *arguments: str, reader: str | None = None) -> Command:
        """Start a docker command, its standard output into a shell's ``reader`` if there is one."""
        command = self._stage.cli.command(self._address, *arguments)
        shown = " ".join(["docker", *command[1:]]) + (f" | sh -c '{reader}'" if reader else "")
        say(f"docker {' '.join(arguments[:1])} ...")
        if self._namespace:
            # Not "ip netns exec", which would give it another /sys.
            command = ["nsenter", f"--net=/run/netns/{self._namespace}", *command]
        output = self._stage.directory / f"output-{self._stage.number()}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if reader else file,
                stderr=file,
                env=_cli_environment(),
                start_new_session=True,  # a Ctrl-C at the demo is the demo's; docker gets its own in one story
            )
        self._commands.append(Command(shown, output, process))
        return self._commands[-1]

    def note(self, text: str) -> None:
        """Write down what is done now to what goes on."""
        self._notes.append(f"after {self._commands[0].so_far_s():.1f} s {text}")

    def await_abort(self, proxy: ProxyProcess) -> None:
        """Wait until the proxy has told of an abort; or for a moment longer than the first command takes; not for long.

        Whether what it told is right is judged later, and so is what it did not tell.
        """
        command = self._commands[0]

        def told() -> bool:
            if any(record["event"] == "request.abort" for record in proxy.requests()):
                return True
            return command.ended() and command.so_far_s() > (command.took_s or 0.0) + 3.0

        with contextlib.suppress(AssertionError):  # it told of none
            wait_until(told, "a record of the abort", 45.0)

    def await_dockerd(self, words: str) -> None:
        """Wait until dockerd has logged some words, a moment after the client was cut off; not for long."""
        with contextlib.suppress(AssertionError):  # the story says what it lacks
            wait_until(lambda: words in self._dockerd.log()[self._said_before :], "dockerd's last word", 15.0)

    def tell(
        self, proxy: ProxyProcess | None, who: str, how: str, proxy_said: collections.abc.Sequence[str] = ()
    ) -> Told:
        """End the scene and our proxy, if it is ours. Returns: what was said."""
        self.end_commands()
        docker_said = [line for command in self._commands for line in command.text().splitlines()]
        dockerd_said = [_short(line) for line in self._dockerd.log()[self._said_before :].splitlines()]
        records: list[LogRecord] = []
        if proxy is not None:
            proxy.stop()
            records = proxy.requests()
            for record in records:
                check_record(record)
        return Told(
            who,
            how,
            tuple(self._commands),
            tuple(self._notes),
            tuple(line for line in docker_said if line.strip()),
            tuple(line for line in dockerd_said if line),
            tuple(proxy_said),
            tuple(records),
        )


# logfmt, as dockerd writes it.
_LOGFMT = re.compile(r'time="[^"]*" level=(?P<level>\w+) msg="(?P<message>(?:[^"\\]|\\.)*)"(?P<rest>.*)')


# What it says of each container where control groups are not as it likes them.
_NOISE = ("loading cgroup for", "cleanup warnings")


def _short(line: str) -> str:
    """Returns: level and message of a line of dockerd's that has to do with how something ended; or nothing."""
    found = _LOGFMT.match(line)
    if found is None or found["message"].startswith(_NOISE):
        return ""
    if found["level"] not in ("warning", "error", "fatal", "panic") and "cancel" not in line:
        return ""
    error = re.search(r'error="(?:[^"\\]|\\.)*"', found["rest"])
    return f"{found['level']}: {found['message']} {error[0] if error else ''}".replace('\\"', '"').strip()
