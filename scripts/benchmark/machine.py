"""What the kernel knows of processes: their CPU time, memory and children, and what the machine is.

Nothing here knows of proxies. CPU time comes from each process's own CPU clock, which counts nanoseconds and keeps
what threads that have ended used; /proc/PID/stat has the same in ticks of 10 ms.
"""

import collections.abc
import os
import pathlib
import platform
import resource
import signal
import ssl
import subprocess
import sys
import time
import typing

PROC = pathlib.Path("/proc")
ENOUGH_FILES = 16384


def process_tree(pid: int) -> list[int]:
    """List a process and all its living descendants; empty if it is gone."""
    found = [pid]
    for parent in found:
        for listing in PROC.glob(f"{parent}/task/*/children"):
            try:
                found.extend(int(child) for child in listing.read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that ended meanwhile
    return [each for each in found if (PROC / str(each)).exists()]


def cpu_seconds(pids: collections.abc.Iterable[int]) -> float:
    """Sum up the CPU time, user and system, that processes have used so far.

    Source: the clock id of a process is ~pid << 3 | CPUCLOCK_SCHED; clock_getcpuclockid(3) computes the same.
    """
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | 2)
        except OSError:
            continue  # ended since it was listed
    return total


def memory_bytes(pids: collections.abc.Iterable[int]) -> int:
    """Sum up the proportional set size of processes: pages that several share are counted once."""
    total = 0
    for pid in pids:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def machine_busy_seconds() -> float:
    """Tell how long the cores of the machine have worked, for whomever, since it started; ticks of 10 ms."""
    user, nice, system, _idle, _iowait, irq, softirq, *_rest = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(int(ticks) for ticks in (user, nice, system, irq, softirq)) / os.sysconf("SC_CLK_TCK")


def own_busy_seconds() -> float:
    """Tell how much of that this process and everything it started used, ended children included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return cpu_seconds(process_tree(os.getpid())) + ended.ru_utime + ended.ru_stime


def raise_file_limit() -> None:
    """Let this process, and so all it starts, open as many files as it may: 2,000 streams are 4,000 sockets."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1 << 17 if hard == resource.RLIM_INFINITY else min(hard, 1 << 17)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < ENOUGH_FILES:
        sys.stderr.write(f"bench: only {wanted} files may be open; the figures with many connections may fail\n")


def describe_machine() -> str:
    """Name processor, cores, kernel, system, and the Python and OpenSSL that ours runs on, in one line."""
    model = "unknown processor"
    for line in (PROC / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = " ".join(line.split(":", 1)[1].split())
            break
    cores = len(os.sched_getaffinity(0))
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = "unknown system"
    openssl = " ".join(ssl.OPENSSL_VERSION.split()[:2])
    python = f"CPython {platform.python_version()} with {openssl}"
    return f"{model}, {cores} cores, Linux {platform.release()}, {system}, {python}"


class Disturbance:
    """How much of a core processes other than ours use, from its making on."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._machine = machine_busy_seconds()
        self._own = own_busy_seconds()

    def share(self) -> float:
        """Tell it, as a share of one core."""
        foreign = machine_busy_seconds() - self._machine - (own_busy_seconds() - self._own)
        # The machine's clock ticks every 10 ms: over short times the difference is noise.
        return max(0.0, foreign - 0.03) / (time.monotonic() - self._begun)


class Processes:
    """All that was started, so that all of it can be ended, by pid."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[typing.Any]] = []

    def start(
        self,
        command: collections.abc.Sequence[str | os.PathLike[str]],
        *,
        output: typing.IO[bytes] | int = subprocess.DEVNULL,
        errors: typing.IO[bytes] | int = subprocess.DEVNULL,
        interactive: bool = False,
        prompt: bool = False,
        **more: typing.Any,
    ) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own: Ctrl-C reaches the benchmark alone, which then ends the
        others. All stay in one session, as Linux otherwise shares out the cores between sessions (sched_autogroup),
        and what a proxy is interrupted by depends on how many programs the benchmark started.

        interactive: connect its standard input and output as text. prompt: let it run ahead of everything else, for
        a client that measures delay and hardly uses the processor (without the right to do so it runs as others do).
        """
        if prompt:
            more["preexec_fn"] = _run_ahead
        process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.PIPE if interactive else subprocess.DEVNULL,
            stdout=subprocess.PIPE if interactive else output,
            stderr=errors,
            text=True,
            process_group=0,
            **more,
        )
        self._running.append(process)
        return process

    def end(self, process: "subprocess.Popen[str]") -> None:
        """End a process and its children: ask first, then insist."""
        family = process_tree(process.pid) if process.poll() is None else []
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid in family[1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it went with its parent, as it should
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        self._running.remove(process)

    def end_all(self) -> None:
        """End everything that still runs."""
        for process in list(self._running):
            self.end(process)


def _run_ahead() -> None:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        sys.stderr.write("bench: no right to real-time scheduling; delays will be noisier\n")
