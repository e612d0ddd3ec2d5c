"""A throw-away Debian with systemd as its first process, in namespaces of its own. Nothing here knows pytest.

Its root is a fresh Debian from the distribution's mirror, made once and kept below ``.cache``; each machine writes to a
layer of its own in memory. It has no network but its loopback. What ``apt-get install`` may ask for there lies in apt's
cache; ``forget_packages`` takes that away, too.
"""

import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import typing

from harness import ROOT, wait_until

# Debian's packages, and a file of each.
PACKAGES = {
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "util-linux": "/usr/bin/unshare",
    "iproute2": "/usr/sbin/ip",
}
_INCLUDED = ("systemd", "systemd-sysv", "dbus", "logrotate", "util-linux", "iproute2")
_AT_HAND = ("python3", "python3-urllib3", "python3-certifi", "python3-pythonjsonlogger")
_BOOT_S = 60.0
_TREE = ("proxy.py", "scripts/install", "deploy")

# A control group of its own, so that its systemd rules over nothing of ours.
_ENTER = """
set -e
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo $$ >"$1/cgroup/$2/cgroup.procs"
umount "$1/cgroup"
shift 2
exec unshare --pid --mount --uts --ipc --net --cgroup --fork --kill-child --propagation private "$@"
"""

_BOOT = """
set -e
base=$1 work=$2 root=$2/root
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/work" "$root"
mount -t overlay overlay -o "lowerdir=$base,upperdir=$work/upper,workdir=$work/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm" "$root/run/systemd"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
# What tells systemd that this is no hardware of its own.
echo throw-away >"$root/run/systemd/container"
ip link set lo up
# Not chroot: the kernel gives a process in one no user namespace, and PrivateUsers= needs that.
mkdir "$root/.before"
cd "$root"
pivot_root . .before
umount -l /.before
rmdir /.before
cd /
exec env -i container=throw-away PATH=/usr/sbin:/usr/bin:/sbin:/bin "${@:3}"
"""


def missing_parts() -> str | None:
    """Returns: why no such machine can be had here, or None if it can."""
    if os.geteuid() != 0:
        return "a machine of namespaces needs root"
    absent = [package for package, path in PACKAGES.items() if not os.path.exists(path)]
    if absent:
        return f"missing Debian packages: {' '.join(absent)}"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
        return "this root may not make mount namespaces (CAP_SYS_ADMIN)"
    if "\toverlay\n" not in pathlib.Path("/proc/filesystems").read_text():
        return "this kernel has no overlay file system"
    return None


def base_root() -> pathlib.Path:
    """Make the root that all machines share, if it is not there yet. Returns: its directory."""
    suite = _os_release("VERSION_CODENAME")
    key = hashlib.sha256(repr((suite, _INCLUDED, _AT_HAND)).encode()).hexdigest()[:12]
    root = ROOT / ".cache" / f"machine-{suite}-{key}"
    if root.exists():
        return root
    root.parent.mkdir(exist_ok=True)
    made = pathlib.Path(tempfile.mkdtemp(prefix="machine-making-", dir=root.parent))
    places = [*pathlib.Path("/etc/apt").glob("sources.list"), *pathlib.Path("/etc/apt/sources.list.d").glob("*")]
    sources = [str(path) for path in places if suite in path.read_text()]
    download = f'chroot "$1" apt-get -qq -y install --download-only --no-install-recommends {" ".join(_AT_HAND)}'
    command = [
        *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(_INCLUDED)}"),
        *("--skip=cleanup/apt", f"--customize-hook={download}"),
        *(suite, str(made / "root"), *sources),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"mmdebstrap failed: {done.stderr.strip()[-2000:]}")
        # Two at once: who is first has it.
        with contextlib.suppress(OSError):
            (made / "root").rename(root)
    finally:
        shutil.rmtree(made)
    return root


def _os_release(name: str) -> str:
    for line in pathlib.Path("/etc/os-release").read_text().splitlines():
        key, _, value = line.partition("=")
        if key == name:
            return value.strip('"')
    raise RuntimeError(f"/etc/os-release has no {name}")


class Machine:
    """One machine with the checkout in /root/checkout. Use it with ``with``. Not ``booted``: systemd does not run."""

    def __init__(self, *, booted: bool = True) -> None:
        self.booted = booted
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="machine"))
        self._process: subprocess.Popen[bytes] | None = None
        self._first_pid = 0

    def __enter__(self) -> typing.Self:
        (self.directory / "cgroup").mkdir()
        (self.directory / "work").mkdir()
        first = (
            ["/lib/systemd/systemd", "--system", "--unit=multi-user.target"] if self.booted else ["sleep", "infinity"]
        )
        boot = ["bash", "-c", _BOOT, "boot", str(base_root()), str(self.directory / "work"), *first]
        try:
            with (self.directory / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    ["bash", "-c", _ENTER, "enter", str(self.directory), self.directory.name, *boot],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            wait_until(self._is_up, _BOOT_S, f"a machine, up ({self.directory / 'log'}),")
            if self.booted:
                self.run("systemctl", "is-system-running", "--wait", status=None)
            for name in _TREE:
                source, target = ROOT / name, self.path("/root/checkout") / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target)
                else:
                    shutil.copy(source, target)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _is_up(self) -> bool:
        assert self._process is not None
        said = (self.directory / "log").read_text("utf-8", "replace")
        assert self._process.poll() is None, f"the machine ended: {said}"
        children = pathlib.Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._first_pid = int(children[0])
        if not self.booted:
            with contextlib.suppress(OSError):  # a child of what comes before it, which has ended
                return pathlib.Path(f"/proc/{self._first_pid}/comm").read_text().strip() == "sleep"
            return False
        return self.path("/run/dbus/system_bus_socket").exists()

    def path(self, inside: str) -> pathlib.Path:
        """Returns: the path that leads to ``inside`` from here."""
        return pathlib.Path(f"/proc/{self._first_pid}/root{inside}")

    def run(self, *command: str, status: int | None = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as root. Raises: AssertionError if its status is not ``status``; None takes any."""
        done = subprocess.run(
            [*self._enter(), *command],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=self._environ() | environ,
        )
        assert status in (None, done.returncode), (command, done.returncode, done.stdout, done.stderr)
        return done

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a program. It ends with the machine at the latest."""
        return subprocess.Popen([*self._enter(), *command], stdin=subprocess.DEVNULL, env=self._environ())

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self._first_pid}", "--all", "--root", "env", "--chdir=/root"]

    def _environ(self) -> dict[str, str]:
        return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}

    def forget_packages(self) -> None:
        """Take away apt's cache, so that with no network nothing can be installed."""
        for name in ("/var/cache/apt/archives", "/var/lib/apt/lists"):
            shutil.rmtree(self.path(name))
            self.path(name).mkdir()

    def stop(self) -> None:
        """End all that runs in it, and remove it."""
        if self._process is not None:
            if self._first_pid:
                with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                    os.kill(self._first_pid, signal.SIGKILL)
            else:
                self._process.kill()
            self._process.wait(30)
            self._process = None
            subprocess.run(
                ["unshare", "--mount", "bash", "-c", _LEAVE, "leave", str(self.directory), self.directory.name],
                check=True,
            )
        shutil.rmtree(self.directory)


_LEAVE = """
set -e
mount -t cgroup2 cgroup2 "$1/cgroup"
[ ! -d "$1/cgroup/$2" ] || find "$1/cgroup/$2" -depth -type d -exec rmdir {} +
"""
