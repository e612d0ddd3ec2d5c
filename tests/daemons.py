"""Real parts around the proxy: dockerd, a registry, a rate-limited link to it, docker CLIs. Nothing here knows pytest.

dockerd runs as root in PID and mount namespaces of its own: when its first process is killed, containerd, shims,
containers and mounts are gone with it, whatever state a test left them in, and nothing of the machine's own docker is
touched.
"""

import collections.abc
import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import selectors
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
import types
import typing

from harness import wait_until

# Debian's packages, and a file of each that the tests run.
PACKAGES = {
    "docker.io": "/usr/sbin/dockerd",
    "docker-registry": "/usr/bin/docker-registry",
    "busybox-static": "/bin/busybox",
    "util-linux": "/usr/bin/unshare",
}
_READY_WITHIN_S = 60.0
# Sockets of dockerd and containerd stand below it, and a socket's path holds 107 octets.
_LONGEST_TEMPORARY = 40

# On a machine without systemd nobody has mounted control groups, and runc wants some. Done in the namespace's own
# mounts, so that nothing stays behind.
_ENTER = """
set -e
mkdir -p /run/containerd
mount -t tmpfs tmpfs /run/containerd
if [ ! -e /sys/fs/cgroup/cgroup.controllers ] && ! grep -q ' /sys/fs/cgroup/' /proc/self/mountinfo; then
    mount -t tmpfs -o mode=755 cgroup_root /sys/fs/cgroup
    # What belongs to a version 2 hierarchy can't be mounted here.
    for controller in $(awk '!/^#/ && $4 == 1 {print $1}' /proc/cgroups); do
        place=/sys/fs/cgroup/$controller
        mkdir "$place"
        mount -t cgroup -o "$controller" cgroup "$place" 2>/dev/null || rmdir "$place"
    done
    if [ ! -d /sys/fs/cgroup/devices ]; then
        umount /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
    fi
fi
exec "$@"
"""


def missing_parts() -> str | None:
    """Returns: why dockerd can't be run here, or None if it can."""
    if os.geteuid() != 0:
        return "a docker daemon of our own needs root"
    absent = [package for package, path in PACKAGES.items() if not os.path.exists(path)]
    if absent:
        return f"missing Debian packages: {' '.join(absent)}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        return "this root may not make mount namespaces (CAP_SYS_ADMIN)"
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY:
        return f"no room for the paths of sockets below {tempfile.gettempdir()}; set TMPDIR=/tmp"
    return None


def clean_environment(**extra: str) -> dict[str, str]:
    """Returns: the environment without what would change where or how a docker client or daemon connects."""
    proxies = {"http_proxy", "https_proxy", "all_proxy", "no_proxy"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DOCKER_", "BUILDKIT_", "PROXY_")) and name.lower() not in proxies
    }
    return kept | extra


def processes() -> collections.abc.Iterator[tuple[int, int, str]]:
    """Yields: pid, parent's pid and command line of each process there is; zombies have an empty line."""
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        yield int(entry.name), int(status.rpartition(")")[2].split()[1]), line


def running(marker: str) -> list[int]:
    """Returns: pids of the processes with ``marker`` in their command line, in any container too."""
    return [pid for pid, _, line in processes() if marker in line]


class Identity(typing.NamedTuple):
    """Files for a client of mutual TLS: whom to trust, and its certificate with its key."""

    ca: str
    certificate: str


class Address(typing.NamedTuple):
    """Where something listens: a path, or host and port, and for TLS what a client needs."""

    path: str | None
    host: str = ""
    port: int = 0
    tls: Identity | None = None

    @property
    def docker_host(self) -> str:
        """As the docker CLI takes it."""
        return f"unix://{self.path}" if self.path else f"tcp://{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """As the proxy's ``--upstream`` takes it."""
        return f"unix://{self.path}" if self.path else f"http://{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        """Returns: a plain connection. Raises: OSError."""
        if self.path:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self.path)
            except OSError:
                sock.close()
                raise
            return sock
        return socket.create_connection((self.host, self.port), 5)


# An address at which nobody else asks for a free port.
_OWN_HOST = "127.9.9.1"


def free_port() -> int:
    """Returns: a TCP port that was free a moment ago, for programs that can't choose one themselves."""
    with socket.create_server((_OWN_HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _http_get(address: Address, target: str) -> bytes:
    """Returns: the whole response, or nothing if nobody listens yet."""
    try:
        with address.connect() as sock:
            sock.settimeout(5)
            sock.sendall(f"GET {target} HTTP/1.0\r\nHost: ready\r\n\r\n".encode())
            received = b""
            while chunk := sock.recv(65536):
                received += chunk
            return received
    except (ConnectionError, FileNotFoundError, TimeoutError):
        return b""  # not ready


class _Process:
    """A program of ours in a directory of ours, its output in a file."""

    def __init__(self, name: str, directory: pathlib.Path) -> None:
        self.name = name
        self.directory = directory
        self.log_path = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self, command: list[str]) -> None:
        # containerd, asked to say why it takes so long to end, leaves its stacks where temporary files go.
        environment = clean_environment(TMPDIR=str(self.directory))
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.directory
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Returns: what it has said so far."""
        return self.log_path.read_text("utf-8", "replace")

    def _wait_ready(self, ready: collections.abc.Callable[[], bool]) -> None:
        def ready_or_ended() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with status {self._process.returncode}:\n{self.log()[-4000:]}")
            return ready()

        try:
            wait_until(ready_or_ended, _READY_WITHIN_S, f"{self.name}, ready,")
        except AssertionError as error:
            error.add_note(self.log()[-4000:])
            raise


class Dockerd(_Process):
    """A docker daemon of our own, on a unix socket and a TCP port. Start and stop it with ``with``."""

    def __init__(self) -> None:
        # Short: containerd puts sockets below it, and a socket's path holds 107 octets.
        super().__init__("dockerd", pathlib.Path(tempfile.mkdtemp(prefix="dkr")))
        self.unix = Address(str(self.directory / "docker.sock"))
        self.tcp = Address(None, _OWN_HOST, free_port())
        self.cgroup = self.directory.name
        # With --bridge=none dockerd deletes docker0, from under the machine's own daemon if there is one.
        self.bridge = self.directory.name if os.path.exists("/sys/class/net/docker0") else "none"

    def __enter__(self) -> typing.Self:
        (self.directory / "daemon.json").write_text("{}")
        if self.bridge != "none":
            subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], check=True)
        namespaces = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--mount-proc", "--kill-child"]
        enter = ["sh", "-c", _ENTER, "sh"]
        daemon = [
            "dockerd",
            *("--config-file", str(self.directory / "daemon.json")),  # and not the machine's
            *("-H", self.tcp.docker_host, "-H", self.unix.docker_host),
            *("--data-root", str(self.directory / "data"), "--exec-root", str(self.directory / "exec")),
            *("--pidfile", str(self.directory / "pid"), "--cgroup-parent", f"/{self.cgroup}"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs"),  # systemd's, where it runs, takes no such parent
            *("--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false"),
            *("--userland-proxy=false", "--bridge", self.bridge),
        ]
        try:
            self._start(namespaces + enter + daemon)
            self._wait_ready(lambda: all(_http_get(a, "/_ping").endswith(b"OK") for a in (self.unix, self.tcp)))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()

    def kill(self) -> None:
        """Kill dockerd and all that it started, as ``kill -9`` does."""
        if self._process is None:
            return
        # The first process of the namespace. unshare waits for it, and it is not gone before all others in there are.
        for pid, parent, _ in list(processes()):
            if parent == self._process.pid:
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def stop(self) -> None:
        """Kill it and remove all that it kept."""
        self.kill()
        hierarchies = pathlib.Path("/sys/fs/cgroup")
        for root in [*hierarchies.glob(f"*/{self.cgroup}"), hierarchies / self.cgroup]:
            for directory, _, _ in os.walk(root, topdown=False):
                os.rmdir(directory)
        if self.bridge != "none":
            subprocess.run(["ip", "link", "delete", self.bridge], check=True)
        shutil.rmtree(self.directory)


class Registry(_Process):
    """A registry of our own on a TCP port. Start and stop it with ``with``."""

    def __init__(self) -> None:
        super().__init__("docker-registry", pathlib.Path(tempfile.mkdtemp(prefix="registry")))
        self.address = Address(None, "127.0.0.1", 0)

    def __enter__(self) -> typing.Self:
        config = self.directory / "config.yml"
        config.write_text(
            "version: 0.1\n"
            f"storage: {{filesystem: {{rootdirectory: {self.directory}/data}}, delete: {{enabled: true}}}}\n"
            "http: {addr: '127.0.0.1:0'}\n"
        )
        self._start(["docker-registry", "serve", str(config)])
        try:
            self._wait_ready(self._listening)
        except BaseException:
            self.stop()
            raise
        return self

    def _listening(self) -> bool:
        found = re.search(r"listening on 127\.0\.0\.1:([1-9]\d*)", self.log())
        if found is None:
            return False
        self.address = Address(None, "127.0.0.1", int(found[1]))
        return b" 200 " in _http_get(self.address, "/v2/").split(b"\r\n", 1)[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it and remove all that it kept."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None
        shutil.rmtree(self.directory)


class Link:
    """A TCP relay that counts what passes, and may let only so many bytes a second through towards its target.

    Counts and rate are those of all connections together. The way back is never slow. It listens in the network
    namespace that it is made in, and connects from the one that it is started in.
    """

    _CHUNK = 16 * 1024
    _BUFFER = 64 * 1024

    def __init__(self, target: Address, bytes_per_s: float | None = None, host: str = "127.0.0.1") -> None:
        self.target = target
        self.bytes_per_s = bytes_per_s
        self.forwarded_bytes = 0
        self.returned_bytes = 0
        self._next_at = time.monotonic()
        self._lock = threading.Lock()  # guards the counts, _next_at, _open and _threads
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._listener = socket.socket()
        # Accepted sockets inherit it. With large buffers the sender would believe megabytes to be through that are not.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._BUFFER)
        self._listener.bind((host, 0))
        self._listener.listen()
        self.address = Address(None, host, self._listener.getsockname()[1])

    def __enter__(self) -> typing.Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept; close alone would not
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # its peer was faster
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _spawn(self, target: collections.abc.Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # shut down by __exit__
            server = self.target.connect()
            with self._lock:
                self._open |= {client, server}
            self._spawn(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        server.settimeout(None)
        back = threading.Thread(target=self._pump, args=(server, client, self._count_returned), daemon=True)
        back.start()
        self._pump(client, server, self._pace)
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _count_returned(self, count: int) -> None:
        with self._lock:
            self.returned_bytes += count

    def _pace(self, count: int) -> None:
        with self._lock:
            self.forwarded_bytes += count
            if self.bytes_per_s is None:
                return
            now = time.monotonic()
            self._next_at = max(now, self._next_at) + count / self.bytes_per_s
            wait_s = self._next_at - now
        self._closed.wait(wait_s)

    def _pump(self, source: socket.socket, sink: socket.socket, passing: collections.abc.Callable[[int], None]) -> None:
        try:
            while chunk := source.recv(self._CHUNK):
                passing(len(chunk))
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One side broke: both are ended, so that neither waits for the other.
            for sock in (source, sink):
                with contextlib.suppress(OSError):  # already ended
                    sock.shutdown(socket.SHUT_RDWR)


# -- docker's command line --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class DockerCli:
    """One docker CLI of this machine."""

    path: str
    version: str

    def __str__(self) -> str:
        return f"docker-{self.version}"

    @property
    def major(self) -> int:
        """The first number of its version."""
        return int(self.version.split(".")[0])

    def has_buildkit(self) -> bool:
        """Whether it can build with BuildKit: built in up to 20.10, later a plugin's doing."""
        if self.major < 23:
            return True
        asked = [self.path, "buildx", "version"]
        done = subprocess.run(asked, capture_output=True, env=clean_environment(), check=False)
        return done.returncode == 0

    def command(self, address: Address, *arguments: str) -> list[str]:
        """Returns: the command line that sends ``arguments`` to ``address``."""
        tls: list[str] = []
        if address.tls:
            files = {"cacert": address.tls.ca, "cert": address.tls.certificate, "key": address.tls.certificate}
            tls = ["--tlsverify", *(f"--tls{name}={path}" for name, path in files.items())]
        return [self.path, *tls, "-H", address.docker_host, *arguments]


@functools.cache
def docker_clis() -> tuple[DockerCli, ...]:
    """Returns: the docker CLIs of this machine, one of each version, the oldest first."""
    found: dict[str, DockerCli] = {}
    for directory in [*os.environ.get("PATH", "").split(os.pathsep), "/usr/bin"]:
        path = os.path.join(directory, "docker")
        if not os.access(path, os.X_OK):
            continue
        asked = subprocess.run(
            [path, "--version"], capture_output=True, text=True, env=clean_environment(), check=False
        )
        version = re.match(r"Docker version (\d+\.\d+\.\d+)", asked.stdout)
        if version is not None:
            found.setdefault(version[1], DockerCli(os.path.realpath(path), version[1]))
    return tuple(sorted(found.values(), key=lambda cli: [int(part) for part in cli.version.split(".")]))


# -- images, made here: there is no network to pull from ------------------------------------------------------------

_APPLETS = ("sh", "cat", "echo", "sleep", "dd", "head", "wc", "sha256sum", "true", "seq", "ls", "test", "mkdir")


class RandomFile(io.RawIOBase):
    """A file of random content, which no compression shrinks, made while it is read. ``sha256``: of what was read."""

    def __init__(self, size: int) -> None:
        self._left = size
        self.sha256 = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        chunk = os.urandom(self._left if size < 0 else min(size, self._left))
        self._left -= len(chunk)
        self.sha256.update(chunk)
        return chunk


def write_image_tar(path: pathlib.Path, *, busybox: bool, blob_bytes: int) -> str:
    """Write a tar for ``docker import``: busybox and its commands if asked, and ``/blob`` of random content.

    Returns: the SHA-256 of ``/blob``.
    """
    blob = RandomFile(blob_bytes)
    with tarfile.open(path, "w") as tar:
        if busybox:
            tar.add(PACKAGES["busybox-static"], "bin/busybox")
            for applet in _APPLETS:
                link = tarfile.TarInfo(f"bin/{applet}")
                link.type, link.linkname = tarfile.SYMTYPE, "busybox"
                tar.addfile(link)
        entry = tarfile.TarInfo("blob")
        entry.size = blob_bytes
        tar.addfile(entry, typing.cast("typing.IO[bytes]", blob))
    return blob.sha256.hexdigest()


def read_lines(
    process: subprocess.Popen[bytes], until: collections.abc.Callable[[str], bool], within_s: float = 30.0
) -> str:
    """Read standard output of a process until a whole line satisfies ``until``.

    Returns: what was read. Raises: TimeoutError, EOFError.
    """
    assert process.stdout is not None
    fd = process.stdout.fileno()
    ends_at = time.monotonic() + within_s
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not any(until(line) for line in text.decode("utf-8", "replace").split("\n")[:-1]):
            if not selector.select(max(0.0, ends_at - time.monotonic())):
                raise TimeoutError(f"not said within {within_s:g} s; so far: {text!r}")
            chunk = os.read(fd, 65536)
            if not chunk:
                raise EOFError(f"ended; it said: {text!r}")
            text += chunk
    return text.decode("utf-8", "replace")
