"""Real docker through the proxy: CLIs and docker-py in front, dockerd and a registry behind.

Each test starts a proxy of its own and ends with its books: begun, ended and logged must agree, and no request may have
been aborted other than those the test names.
"""

import collections.abc
import contextlib
import dataclasses
import gc
import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import signal
import subprocess
import tarfile
import tempfile
import typing

import docker
import docker.tls
import pytest
import requests.adapters

from conftest import Certificates
from daemons import (
    Address,
    DockerCli,
    Dockerd,
    Identity,
    Link,
    Registry,
    clean_environment,
    docker_clis,
    missing_parts,
    read_lines,
    running,
    write_image_tar,
)
from harness import TERMINAL, LogRecord, ProxyProcess, wait_until

_MIB = 1024 * 1024
_BLOB_BYTES = 50 * _MIB
_HEAVY_BYTES = 256 * _MIB
_PUSH_BYTES = 60 * _MIB
# The slow push: 60 MiB at this rate take 28 s.
_PUSH_BYTES_PER_S = 2_250_000
# "At once", for what the contract wants within a second.
_PROMPTLY_S = 1.0

_missing = missing_parts()
pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(180),
    pytest.mark.skipif(_missing is not None, reason=f"no real docker here: {_missing}"),
]


@dataclasses.dataclass(frozen=True)
class Way:
    """How clients reach the proxy, and how the proxy reaches dockerd."""

    listen: typing.Literal["tcp", "unix", "mtls"]
    upstream: typing.Literal["tcp", "unix"]

    def __str__(self) -> str:
        return f"{self.listen}-to-{self.upstream}"


_TCP, _UNIX, _MTLS = Way("tcp", "unix"), Way("unix", "tcp"), Way("mtls", "tcp")
_TCP_TO_TCP = Way("tcp", "tcp")  # the one that can be spliced from end to end

# An empty one, where BuildKit's client leaves a file, and makes the directory if there is none.
_CONFIG = tempfile.TemporaryDirectory(prefix="docker-config-")
_CLIS = docker_clis()
_EVERY_CLI = pytest.mark.parametrize("cli", _CLIS, ids=str)
_FIRST_CLI = pytest.mark.parametrize("cli", _CLIS[:1], ids=str)
_EVERY_WAY = pytest.mark.parametrize("way", [_TCP, _UNIX, _MTLS], ids=str)
# Where the matter is bytes more than commands: each way once, the CLIs in turn.
_EACH_WAY_ONCE = pytest.mark.parametrize(
    ("way", "cli"),
    [(way, _CLIS[i % len(_CLIS)]) for i, way in enumerate([_TCP, _UNIX, _MTLS, _TCP_TO_TCP]) if _CLIS],
    ids=str,
)


# -- what the tests stand on -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Image:
    """An image made here, its tar as ``docker import`` takes it, and the digest of ``/blob`` in it."""

    name: str
    tar: pathlib.Path
    blob_sha256: str


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("docker")


@pytest.fixture(scope="session")
def dockerd() -> collections.abc.Iterator[Dockerd]:
    with Dockerd() as daemon:
        yield daemon


@pytest.fixture(scope="session")
def registry() -> collections.abc.Iterator[Registry]:
    with Registry() as started:
        yield started


def _make_image(dockerd: Dockerd, name: str, tar: pathlib.Path, *, busybox: bool, blob_bytes: int) -> Image:
    image = Image(name, tar, write_image_tar(tar, busybox=busybox, blob_bytes=blob_bytes))
    _direct(dockerd, "import", str(tar), name)
    return image


@pytest.fixture(scope="session")
def box(dockerd: Dockerd, workplace: pathlib.Path) -> Image:
    """A small system with 50 MiB of random content."""
    return _make_image(dockerd, "box", workplace / "box.tar", busybox=True, blob_bytes=_BLOB_BYTES)


@pytest.fixture(scope="session")
def heavy(dockerd: Dockerd, workplace: pathlib.Path) -> Image:
    return _make_image(dockerd, "heavy", workplace / "heavy.tar", busybox=False, blob_bytes=_HEAVY_BYTES)


def _docker(
    cli: DockerCli,
    address: Address,
    *arguments: str,
    stdin: bytes | pathlib.Path | None = None,
    stdout: pathlib.Path | None = None,
    buildkit: bool = False,
    timeout_s: float = 100.0,
) -> subprocess.CompletedProcess[bytes]:
    """Run a docker command to its end, whatever that is."""
    with contextlib.ExitStack() as files:
        source = files.enter_context(stdin.open("rb")) if isinstance(stdin, pathlib.Path) else None
        sink = files.enter_context(stdout.open("wb")) if stdout is not None else subprocess.PIPE
        if source is None and stdin is None:
            source = files.enter_context(open(os.devnull, "rb"))
        return subprocess.run(
            cli.command(address, *arguments),
            stdin=source,
            input=stdin if isinstance(stdin, bytes) else None,
            stdout=sink,
            stderr=subprocess.PIPE,
            env=_cli_environment(buildkit),
            timeout=timeout_s,
            check=False,
        )


def _cli_environment(buildkit: bool) -> dict[str, str]:
    return clean_environment(DOCKER_BUILDKIT="1" if buildkit else "0", DOCKER_CONFIG=_CONFIG.name)


def _direct(dockerd: Dockerd, *arguments: str) -> str:
    """Run a docker command past the proxy. Returns: what it printed."""
    done = _docker(_CLIS[0], dockerd.unix, *arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def _with_target(pattern: str) -> collections.abc.Callable[[LogRecord], bool]:
    return lambda record: record["event"] in TERMINAL and re.search(pattern, str(record["target"])) is not None


class Through:
    """A proxy in front of a daemon, and a docker CLI in front of the proxy."""

    def __init__(self, proxy: ProxyProcess, address: Address, cli: DockerCli) -> None:
        self.proxy = proxy
        self.address = address
        self.cli = cli
        self.expected: list[collections.abc.Callable[[LogRecord], bool]] = []

    def run(self, *arguments: str, **how: typing.Any) -> subprocess.CompletedProcess[bytes]:
        """Run a docker command that must succeed."""
        done = self.attempt(*arguments, **how)
        assert done.returncode == 0, (arguments, done.returncode, done.stderr.decode())
        return done

    def attempt(self, *arguments: str, **how: typing.Any) -> subprocess.CompletedProcess[bytes]:
        """Run a docker command, whatever comes of it."""
        return _docker(self.cli, self.address, *arguments, **how)

    @contextlib.contextmanager
    def started(self, *arguments: str, buildkit: bool = False) -> collections.abc.Iterator[subprocess.Popen[bytes]]:
        """Start a docker command, its output in one pipe; it is killed if it has not ended at the end."""
        with subprocess.Popen(
            self.cli.command(self.address, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_cli_environment(buildkit),
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def complete(self, target: str) -> LogRecord:
        """Returns: the record of the first request whose target matches, which must be complete.

        The client may have its answer, and be gone, before the record is written.
        """
        record = self.proxy.wait_for(_with_target(target))
        assert record["event"] == "request.complete", record
        return record

    def aborted(self, target: str, side: str, causes: tuple[str, ...] = ("closed", "reset")) -> LogRecord:
        """Returns: the record of the first request whose target matches; that side must have ended it just now."""
        record = self.proxy.wait_for(_with_target(target), _PROMPTLY_S)
        assert record["event"] == "request.abort", record
        assert (record["side"], record["limit"]) == (side, None), record
        if side == "client" and self.address.tls:
            causes += ("tls",)  # ended by a signal, a client says no goodbye in TLS
        assert record["cause"] in causes, record
        self.expect_abort(target, side, causes)
        return record

    def expect_abort(self, target: str, side: str, causes: tuple[str, ...]) -> None:
        """Requests whose target matches may be aborted this way."""

        def fits(record: LogRecord) -> bool:
            return (
                (record["event"], record.get("side")) == ("request.abort", side)
                and record["cause"] in causes
                and _with_target(target)(record)
            )

        self.expected.append(fits)

    def expect_leaving(self, target: str) -> None:
        """The client may close such a connection before it has read all, as it already has what it wants.

        An abort is the truth then, as what it left unread did not reach it.
        """
        self.expect_abort(target, "client", ("closed", "reset", "tls") if self.address.tls else ("closed", "reset"))

    def settle(self) -> None:
        """Stop the proxy and go through its books."""
        self.proxy.stop()
        records = self.proxy.requests()
        assert len(records) == len({record["request_id"] for record in records})
        unexpected = [
            record
            for record in records
            if record["event"] != "request.complete" and not any(expected(record) for expected in self.expected)
        ]
        assert not unexpected, "\n".join(f"{record['event']}: {record['message']}" for record in unexpected)
        assert not [record for record in self.proxy.records() if record["level"] == "error"]


@contextlib.contextmanager
def _through(
    way: Way, cli: DockerCli, dockerd: Dockerd, certificates: Certificates, *options: str
) -> collections.abc.Iterator[Through]:
    upstream = dockerd.unix if way.upstream == "unix" else dockerd.tcp
    identity = None
    if way.listen == "mtls":
        options += ("--tls-cert", certificates.server, "--tls-key", certificates.server)
        options += ("--tls-client-ca", certificates.ca)
        identity = Identity(certificates.ca, certificates.client)
    listen = "unix" if way.listen == "unix" else "127.0.0.1:0"
    with ProxyProcess(upstream.url, "--workers", "2", *options, listen=listen) as proxy:
        path = proxy.address
        address = Address(path) if isinstance(path, str) else Address(None, *path, identity)
        through = Through(proxy, address, cli)
        yield through
        through.settle()


@pytest.fixture
def through(
    way: Way, cli: DockerCli, dockerd: Dockerd, certificates: Certificates, box: Image
) -> collections.abc.Iterator[Through]:
    # A request that a failed test left open must not hold up the others for long.
    with _through(way, cli, dockerd, certificates, "--drain-timeout", "2") as made:
        yield made


@pytest.fixture
def unique() -> str:
    """A name that nothing else has."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def containers(dockerd: Dockerd, unique: str) -> collections.abc.Iterator["Containers"]:
    made = Containers(dockerd, unique)
    yield made
    made.remove()


class Containers:
    """Containers for one test, made past the proxy."""

    def __init__(self, dockerd: Dockerd, name: str) -> None:
        self.dockerd = dockerd
        self.name = name
        self.count = 0

    def make(self, script: str, *options: str, command: str = "run -d") -> str:
        """Make one that runs a shell script. Returns: its name."""
        self.count += 1
        name = f"{self.name}-{self.count}"
        arguments = [*command.split(), "--name", name, "--network", "none", *options, "box", "sh", "-c", script]
        _direct(self.dockerd, *arguments)
        return name

    def shell(self, name: str, script: str) -> None:
        """Run a script in a container. One that ends the container may be killed with it (137) before it returns."""
        done = _docker(_CLIS[0], self.dockerd.unix, "exec", name, "sh", "-c", script)
        assert done.returncode in (0, 137), done.stderr.decode()

    def remove(self) -> None:
        names = _direct(self.dockerd, "ps", "-aq", "--filter", f"name={self.name}").split()
        if names:
            _direct(self.dockerd, "rm", "-f", *names)


def _context(directory: pathlib.Path, *steps: str) -> tuple[str, str]:
    """Write a build context of 3 MB of random content. Returns: its path and the content's digest."""
    directory.mkdir()
    content = secrets.token_bytes(3_000_000)
    (directory / "content").write_bytes(content)
    (directory / "Dockerfile").write_text("\n".join(("FROM box", "COPY content /content", *steps)) + "\n")
    return str(directory), hashlib.sha256(content).hexdigest()


def _file_sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- commands that end well --------------------------------------------------------------------------------------------


@_EVERY_CLI
@_EVERY_WAY
def test_version_and_info(through: Through, dockerd: Dockerd) -> None:
    version = through.run("version", "--format", "{{.Client.Version}} {{.Server.Version}}").stdout.decode().split()
    assert version[0].startswith(through.cli.version)
    assert version[1] == _direct(dockerd, "version", "--format", "{{.Server.Version}}")
    assert through.run("info", "--format", "{{.ID}}").stdout.decode().strip() == _direct(
        dockerd, "info", "--format", "{{.ID}}"
    )


@_EVERY_CLI
@_EVERY_WAY
def test_import(through: Through, dockerd: Dockerd, box: Image, unique: str) -> None:
    image = through.run("import", "-", unique, stdin=box.tar).stdout.decode().strip()
    assert image == _direct(dockerd, "image", "inspect", "--format", "{{.Id}}", unique)
    layers = [_direct(dockerd, "image", "inspect", "--format", "{{.RootFS.Layers}}", name) for name in (unique, "box")]
    assert layers[0] == layers[1]
    record = through.complete("/images/create")
    assert record["bytes"]["request_body"] == box.tar.stat().st_size


@_EVERY_CLI
@_EVERY_WAY
def test_build_classic(through: Through, tmp_path: pathlib.Path, unique: str) -> None:
    context, digest = _context(tmp_path / "context", "RUN sha256sum /content")
    said = through.run("build", "--network", "none", "-t", unique, context).stdout.decode()
    assert digest in said
    assert f"Successfully tagged {unique}:latest" in said


@pytest.mark.parametrize("cli", [c for c in _CLIS if c.has_buildkit()], ids=str)
@pytest.mark.parametrize("way", [_TCP, _UNIX, _MTLS, _TCP_TO_TCP], ids=str)
def test_build_with_buildkit(through: Through, tmp_path: pathlib.Path, unique: str, dockerd: Dockerd) -> None:
    # Both ends of the session end it when the build is done, and what one of them was about to say goes unheard.
    through.expect_leaving("/session$")
    context, digest = _context(tmp_path / "context", "RUN sha256sum /content")
    arguments = ("build", "--network", "none", "--progress", "plain", "-t", unique, context)
    said = through.run(*arguments, buildkit=True).stderr.decode()
    assert digest in said
    assert _direct(dockerd, "image", "inspect", "--format", "{{.RepoTags}}", unique) == f"[{unique}:latest]"
    # The context went through a tunnel, and the tunnel was recorded.
    session = through.proxy.wait_for(_with_target("/session$"))
    assert session["status"] == 101
    assert session["bytes"]["request_body"] > 3_000_000


@_EVERY_CLI
@_EVERY_WAY
def test_run_with_input(through: Through) -> None:
    """sha256sum ends only if the end of its input gets through to it, which must not end the way back."""
    content = secrets.token_bytes(5_000_000)
    done = through.run("run", "-i", "--rm", "--network", "none", "box", "sha256sum", stdin=content)
    assert done.stdout.decode().split()[0] == hashlib.sha256(content).hexdigest()
    attach = through.complete(r"/containers/\w+/attach")
    assert attach["bytes"]["request_body"] == len(content)


@_EACH_WAY_ONCE
def test_run_with_large_output(through: Through, box: Image, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "output"
    through.run("run", "--rm", "--log-driver", "none", "--network", "none", "box", "cat", "/blob", stdout=output)
    assert output.stat().st_size == _BLOB_BYTES
    assert _file_sha256(output) == box.blob_sha256
    attach = through.complete(r"/containers/\w+/attach")
    assert attach["bytes"]["response_body"] > _BLOB_BYTES


@_EVERY_CLI
@_EVERY_WAY
def test_run_whose_output_is_read_late(through: Through, dockerd: Dockerd, box: Image, unique: str) -> None:
    """``docker run | less``: the container is gone before its output is read, which waits in buffers by then."""
    script = f"dd if=/blob bs=1000000 count=1 2>/dev/null && : {unique}"
    name = ("--name", unique, "--log-driver", "none", "--network", "none")
    with through.started("run", "--rm", *name, "box", "sh", "-c", script) as run:
        wait_until(lambda: " container destroy " in _direct_events(dockerd, unique), 20, "the container, gone,")
        assert run.stdout is not None
        output = run.stdout.read()
        assert run.wait(10) == 0
    with tarfile.open(box.tar) as tar:
        assert output == _member(tar, "blob", 1_000_000)
    attach = through.complete(r"/containers/\w+/attach")
    assert attach["bytes"]["response_body"] > 1_000_000


@_EACH_WAY_ONCE
def test_commands_that_succeed_and_leave(through: Through, containers: Containers) -> None:
    """What the README names as everyday aborts, so that nobody looks for what is wrong."""
    through.run("run", "-d", "--name", f"{containers.name}-0", "--network", "none", "box", "sleep", "600")
    record = through.aborted("/wait", "client")
    assert record["phase"] == "response_body"
    through.run("stats", "--no-stream")
    record = through.aborted("/events", "client")
    assert record["phase"] == "response_body"


@_EVERY_CLI
@_EVERY_WAY
def test_exec(through: Through, containers: Containers) -> None:
    name = containers.make("sleep 600")
    done = through.attempt("exec", "-i", name, "sh", "-c", "cat; echo problem >&2; exit 7", stdin=b"some input\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"some input\n", b"problem\n")


@_EVERY_CLI
@_EVERY_WAY
def test_attach(through: Through, containers: Containers) -> None:
    name = containers.make("echo ready; cat; exit 3", "-i", command="create")
    done = through.attempt("start", "-a", "-i", name, stdin=b"to be echoed\n")
    assert (done.returncode, done.stdout) == (3, b"ready\nto be echoed\n")
    other = containers.make("while [ ! -e /go ]; do sleep 0.05; done; echo seen; exit 4")
    with through.started("attach", other) as attached:
        # Attached, but for the answer's way back, when dockerd has the container's streams.
        wait_until(lambda: "attach" in _direct_events(containers.dockerd, other), timeout_s=20, what="attached")
        containers.shell(other, ": > /go")
        assert read_lines(attached, lambda line: line == "seen")
        assert attached.wait(10) == 4


def _direct_events(dockerd: Dockerd, container: str) -> str:
    return _direct(dockerd, "events", "--since", "1h", "--until", "0s", "--filter", f"container={container}")


@_EVERY_CLI
@_EVERY_WAY
def test_logs_follow(through: Through, containers: Containers) -> None:
    name = containers.make("echo first; while [ ! -e /go ]; do sleep 0.05; done; echo last")
    with through.started("logs", "-f", name) as logs:
        read_lines(logs, lambda line: line == "first")
        containers.shell(name, ": > /go")
        read_lines(logs, lambda line: line == "last")
        assert logs.wait(10) == 0
    through.complete(r"/logs\?")


@_EVERY_CLI
@_EVERY_WAY
def test_events_until_interrupted(through: Through, containers: Containers) -> None:
    # From before now on, so that nothing is missed whenever the request gets through.
    with through.started("events", "--since", "0s", "--filter", f"container={containers.name}-1") as events:
        name = containers.make("exit 5")
        seen = read_lines(events, lambda line: " container die " in line)
        assert f"name={name}" in seen
        assert "exitCode=5" in seen
        assert not [record for record in through.proxy.requests() if _with_target("/events")(record)]
        events.send_signal(signal.SIGINT)
        # An open event stream has no end of its own: that the client left is no error, but it is an abort, and its.
        record = through.aborted("/events", "client")
        assert record["phase"] == "response_body"
        events.wait(10)


@_EVERY_CLI
@_EVERY_WAY
def test_wait(through: Through, containers: Containers) -> None:
    name = containers.make("while [ ! -e /go ]; do sleep 0.05; done; exit 6")
    with through.started("wait", name) as waiting:
        containers.shell(name, ": > /go")
        read_lines(waiting, lambda line: line == "6")
        assert waiting.wait(10) == 0
    through.complete("/wait")


@_EVERY_CLI
def test_limits_on_the_answers_of_docker(
    cli: DockerCli, dockerd: Dockerd, certificates: Certificates, box: Image, containers: Containers
) -> None:
    """Which of docker's calls answer late, and which are silent in the middle of their answer: as the README says."""
    name = containers.make("trap '' TERM; sleep 3")
    with _through(_TCP, cli, dockerd, certificates, "--upstream-head-timeout", "1") as through:
        through.run("wait", name)
        stubborn = containers.make("trap '' TERM; while :; do sleep 1; done")
        assert through.attempt("stop", "-t", "3", stubborn).returncode == 1
        record = through.proxy.wait_for(_with_target("/stop"))
        assert (record["phase"], record["limit"]["name"]) == ("response_head", "upstream_head_timeout")
        through.expect_abort("/stop", "upstream", ("timeout",))
    with _through(_TCP, cli, dockerd, certificates, "--upstream-read-timeout", "1") as through:
        assert through.attempt("run", "--rm", "--network", "none", box.name, "sleep", "3").returncode == 125
        record = through.proxy.wait_for(_with_target("/wait"))
        assert (record["phase"], record["limit"]["name"]) == ("response_body", "upstream_read_timeout")
        through.expect_abort("/wait", "upstream", ("timeout",))


@_EVERY_CLI
@_EVERY_WAY
def test_cp_both_ways(through: Through, containers: Containers, tmp_path: pathlib.Path) -> None:
    # docker reads a tar up to its end, and not what ends the response after it.
    through.expect_leaving("/archive")
    name = containers.make("sleep 600")
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "a").write_bytes(secrets.token_bytes(5_000_000))
    (directory / "empty").touch()
    through.run("cp", str(directory), f"{name}:/there")
    through.run("cp", f"{name}:/there", str(tmp_path / "back"))
    for file in ("a", "empty"):
        assert _file_sha256(tmp_path / "back" / file) == _file_sha256(directory / file)


@_EACH_WAY_ONCE
def test_save_and_load(through: Through, heavy: Image, dockerd: Dockerd, workplace: pathlib.Path) -> None:
    directly, saved = workplace / "heavy-directly.tar", workplace / "heavy-saved.tar"
    identity = _direct(dockerd, "image", "inspect", "--format", "{{.Id}}", "heavy")
    if not directly.exists():
        _direct(dockerd, "save", "-o", str(directly), "heavy")
    try:
        through.run("save", "heavy", stdout=saved)
        assert _file_sha256(saved) == _file_sha256(directly)
        record = through.complete("/images/.*get")
        assert record["bytes"]["response_body"] == saved.stat().st_size
        _direct(dockerd, "rmi", "heavy")
        said = through.run("load", stdin=saved).stdout.decode()
        assert "Loaded image: heavy:latest" in said
        record = through.complete("/images/load")
        assert record["bytes"]["request_body"] == saved.stat().st_size
        # An image's name is the digest of what it consists of, checked by dockerd when it loads.
        assert _direct(dockerd, "image", "inspect", "--format", "{{.Id}}", "heavy") == identity
    finally:
        saved.unlink(missing_ok=True)


@_EVERY_CLI
@_EVERY_WAY
def test_tag_push_and_pull(
    through: Through, dockerd: Dockerd, registry: Registry, tmp_path: pathlib.Path, unique: str
) -> None:
    tar = tmp_path / "image.tar"
    write_image_tar(tar, busybox=False, blob_bytes=5_000_000)
    identity = _direct(dockerd, "import", str(tar), unique)
    name = f"127.0.0.1:{registry.address.port}/{unique}"
    through.run("tag", unique, name)
    assert "latest: digest: sha256:" in through.run("push", name).stdout.decode()
    _direct(dockerd, "rmi", "-f", identity)
    assert "Downloaded newer image" in through.run("pull", name).stdout.decode()
    assert _direct(dockerd, "image", "inspect", "--format", "{{.Id}}", name) == identity


@_FIRST_CLI
def test_slow_push(
    cli: DockerCli,
    dockerd: Dockerd,
    registry: Registry,
    certificates: Certificates,
    tmp_path: pathlib.Path,
    unique: str,
) -> None:
    """The push that the proxy is named for: 60 MB to a slow registry, with no option given, completes."""
    tar = tmp_path / "image.tar"
    write_image_tar(tar, busybox=False, blob_bytes=_PUSH_BYTES)
    _direct(dockerd, "import", str(tar), unique)
    with (
        Link(registry.address, _PUSH_BYTES_PER_S) as link,
        _through(_TCP, cli, dockerd, certificates) as through,
    ):
        name = f"127.0.0.1:{link.address.port}/{unique}"
        through.run("tag", unique, name)
        assert "latest: digest: sha256:" in through.run("push", name).stdout.decode()
        assert link.forwarded_bytes > _PUSH_BYTES
        record = through.complete(f"/images/.*{unique}/push")
        assert record["status"] == 200
        assert record["duration_s"] > 25


# -- docker-py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(through: Through, monkeypatch: pytest.MonkeyPatch) -> collections.abc.Iterator[docker.DockerClient]:
    """docker-py, connected through the proxy."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)  # requests would prefer them to the CA it is given
    base_url = through.address.docker_host.replace("unix://", "http+unix://")
    if through.address.tls is None:
        made = docker.DockerClient(base_url=base_url, timeout=100)
    else:
        ca, identity = through.address.tls
        tls = docker.tls.TLSConfig(client_cert=(identity, identity), ca_cert=ca, verify=True)
        made = docker.DockerClient(base_url=base_url, tls=tls, timeout=100)
    yield made
    # Its close only forgets its connections, and leaves those of streams to the garbage collector.
    for adapter in made.api.adapters.values():
        if isinstance(adapter, requests.adapters.HTTPAdapter):
            pools = adapter.poolmanager.pools
            for key in pools.keys():  # urllib3's container has no iterator
                pools[key].close()
    made.close()
    gc.collect()


def _docker_py_test(function: typing.Any) -> typing.Any:
    """docker-py takes the CLI's place; the fixture still names one."""
    every_way = pytest.mark.parametrize("way", [_TCP, _UNIX, _MTLS, _TCP_TO_TCP], ids=str)
    # docker-py leaves the sockets of its streams to the garbage collector.
    careless = pytest.mark.filterwarnings("ignore::ResourceWarning")
    return careless(_FIRST_CLI(every_way(function)))


@_docker_py_test
def test_docker_py_images(
    client: docker.DockerClient, dockerd: Dockerd, registry: Registry, tmp_path: pathlib.Path, unique: str
) -> None:
    assert client.version()["Version"] == _direct(dockerd, "version", "--format", "{{.Server.Version}}")
    assert client.info()["ID"] == _direct(dockerd, "info", "--format", "{{.ID}}")
    tar = tmp_path / "image.tar"
    write_image_tar(tar, busybox=False, blob_bytes=5_000_000)
    client.api.import_image_from_file(str(tar), repository=unique)
    identity = client.images.get(unique).id
    assert identity is not None
    context, digest = _context(tmp_path / "context", "RUN sha256sum /content")
    _, said = client.images.build(path=context, tag=f"{unique}-built", network_mode="none", rm=True)
    assert digest in json.dumps(list(said))
    saved = b"".join(client.images.get(unique).save(named=True))
    client.images.remove(unique)
    [loaded] = client.images.load(saved)
    assert loaded.id == identity
    name = f"127.0.0.1:{registry.address.port}/{unique}"
    assert loaded.tag(name)
    assert "digest: sha256:" in client.images.push(name)
    client.images.remove(identity, force=True)
    assert client.images.pull(name, tag="latest").id == identity


@_docker_py_test
def test_docker_py_containers(
    client: docker.DockerClient, through: Through, box: Image, containers: Containers
) -> None:
    name = containers.make("echo first; while [ ! -e /go ]; do sleep 0.05; done; echo last; exit 6")
    assert client.containers.run("box", ["echo", "some"], network_mode="none", remove=True) == b"some\n"
    container = client.containers.get(name)
    status, output = container.exec_run(["sh", "-c", "head -c 1000000 /blob | sha256sum; exit 7"])
    with tarfile.open(box.tar) as tar:
        start = _member(tar, "blob", 1_000_000)
    assert isinstance(output, bytes)
    assert (status, output.split()[0]) == (7, hashlib.sha256(start).hexdigest().encode())
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        entry = tarfile.TarInfo("put")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"there"))
    assert container.put_archive("/", content.getvalue())
    stream, _ = container.get_archive("/put")
    with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
        assert _member(tar, "put", 100) == b"there"
    events = client.events(since=0, decode=True, filters={"container": name, "event": "die"})
    logs = container.logs(stream=True, follow=True)
    attached = container.attach(stream=True)
    wait_until(lambda: "attach" in _direct_events(containers.dockerd, name), timeout_s=20, what="attached")
    assert next(logs) == b"first\n"
    containers.shell(name, ": > /go")
    assert container.wait()["StatusCode"] == 6
    assert b"".join(logs) == b"last\n"
    assert b"".join(attached) == b"last\n"
    attached.close()
    assert next(events)["Actor"]["Attributes"]["exitCode"] == "6"
    events.close()
    through.aborted("/events", "client")


def _member(tar: tarfile.TarFile, name: str, size: int) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read(size)


# -- commands that end badly -------------------------------------------------------------------------------------------

_ENDLESS = "RUN echo began: && sleep 600 && echo {0}"


def _build_under_way(build: subprocess.Popen[bytes], marker: str) -> None:
    """Wait until the build runs its endless step."""
    said: list[str] = []

    def under_way() -> bool:
        if build.poll() is not None:
            assert build.stdout is not None
            said.append(build.stdout.read().decode())
            raise RuntimeError(f"the build has ended: {said}")
        # The client names the marker in no argument; the shell in the container does.
        return bool(running(marker))

    wait_until(under_way, 30, "the build is at its endless step")


_BUILDERS = [(cli, buildkit) for cli in _CLIS for buildkit in (False, True) if not buildkit or cli.has_buildkit()]


@pytest.mark.parametrize(
    ("cli", "buildkit"),
    _BUILDERS,
    ids=[f"docker-{cli.version}-{'buildkit' if buildkit else 'classic'}" for cli, buildkit in _BUILDERS],
)
@_EVERY_WAY
def test_interrupted_build(
    through: Through, dockerd: Dockerd, tmp_path: pathlib.Path, unique: str, buildkit: bool
) -> None:
    """Ctrl-C: the daemon must learn of it and stop building, and the log say who left."""
    context, _ = _context(tmp_path / "context", _ENDLESS.format(unique))
    progress = ("--progress", "plain") if buildkit else ()
    with through.started("build", "--network", "none", *progress, context, buildkit=buildkit) as build:
        _build_under_way(build, unique)
        build.send_signal(signal.SIGINT)
        if buildkit:
            # With BuildKit the client asks for the end of the build, and may leave before it has heard of it.
            through.expect_leaving("/session$")
            through.expect_leaving(r"/build\?")
            assert through.complete("/build/cancel")["method"] == "POST"
            through.proxy.wait_for(_with_target(r"/build\?"), _PROMPTLY_S)
        else:
            record = through.aborted(r"/build\?", "client")
            assert (record["method"], record["phase"]) == ("POST", "response_body")
        wait_until(lambda: not running(unique), 20, "the step's processes are gone")
        build.wait(10)
    wait_until(lambda: not _direct(dockerd, "ps", "-q"), 20, "the build's container is gone")


@_EVERY_CLI
@pytest.mark.parametrize("way", [_TCP, _MTLS], ids=str)
def test_killed_daemon(
    way: Way, cli: DockerCli, certificates: Certificates, box: Image, tmp_path: pathlib.Path, unique: str
) -> None:
    """dockerd dies in the middle of a build: the client is told, and the log names dockerd."""
    context, _ = _context(tmp_path / "context", _ENDLESS.format(unique))
    with Dockerd() as daemon:
        _direct(daemon, "import", str(box.tar), "box")
        with _through(way, cli, daemon, certificates) as through:
            with through.started("build", "--network", "none", context) as build:
                _build_under_way(build, unique)
                daemon.kill()
                record = through.aborted("/build", "upstream")
                assert build.stdout is not None
                said = build.stdout.read().decode()
                assert build.wait(10) != 0
            assert record["phase"] == "response_body"
            # Its own words, in place of "unexpected EOF".
            assert record["message"] in said
            after = through.attempt("ps")
            assert after.returncode != 0
            unreachable = ("refused", "unreachable")
            through.expect_abort("/_ping$", "upstream", unreachable)  # how often docker asks depends on its version
            record = through.aborted("/containers/json", "upstream", unreachable)
            assert record["message"] in after.stderr.decode()
