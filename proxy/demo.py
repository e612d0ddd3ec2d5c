"""What the proxy is for, in 10 seconds and without docker: a slow push without limits, then under a forgotten one.

An embedded upstream answers a push as dockerd does, a real proxy runs before it, and what the client saw stands beside
the record. The demo checks what it claims: it fails where record and client disagree.
"""

import collections.abc
import dataclasses
import json
import os
import signal
import socket
import sys
import tempfile
import textwrap
import time
import traceback
import typing

from .config import ConfigError, load_settings
from .dependencies import print_line
from .workers import serve

_PUSH = (
    b"POST /v1.41/images/big/push?tag=latest HTTP/1.1\r\nHost: docker\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
)
_PROGRESS_LINES = 16
_PROGRESS_EVERY_S = 0.25
_LAYER_MB = 48
# Longer than anything here takes: a demo that hangs shows nothing.
_GIVE_UP_S = 15.0
_WIDTH = 100

# The fields of the record that tell the story, and what each says.
_EXPLAINED = (
    (("event",), "request.abort: it ended before its response was whole"),
    (("side",), "whose doing it was; for a limit, the socket it belongs to"),
    (("phase",), "how far the exchange had come"),
    (("operation",), "what the proxy was doing on that socket"),
    (("cause",), "one of the proxy's own limits on a whole transfer"),
    (("limit", "name"), "which limit: the option to look for"),
    (("limit", "seconds"), "its value"),
    (("limit", "elapsed_s"), "how long it had run"),
    (("limit", "source"), "where that value was set: here, a flag nobody remembered"),
    (("status",), "what the client had been told before"),
    (("bytes", "upstream_read"), "bytes that came from upstream"),
    (("bytes", "client_written"), "bytes that went to the client, the last line with the reason included"),
    (("stalled_s", "upstream_read"), "upstream was well: its last byte was this long ago"),
    (("duration_s",), "from the first byte of the request to the end"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    """What the client saw of one push."""

    lines: tuple[dict[str, typing.Any], ...]  # of the JSON message stream
    byte_count: int
    whole: bool  # whether the last chunk came


def end_in_order_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind this process as Ctrl-C does, so that what the demo started ends with it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # and not ignored: nohup
            signal.signal(number, _unwind)


def _unwind(number: int, frame: object) -> typing.NoReturn:
    raise SystemExit(128 + number)


def run_demo() -> int:
    """Show both pushes. Returns: 0, or 1 where a claim did not hold."""
    sys.stdout.flush()
    with (
        tempfile.TemporaryDirectory(prefix="proxy-demo-") as directory,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        upstream = f"http://127.0.0.1:{listener.getsockname()[1]}"
        child = _fork(lambda: _answer_pushes(listener))
        try:
            problems = _show_without_limits(upstream, directory) + _show_forgotten_deadline(upstream, directory)
        finally:
            _end(child, signal.SIGKILL)
    for problem in problems:
        _say(_bold(f"demo failed: {problem}"))
    return 1 if problems else 0


def _show_without_limits(upstream: str, directory: str) -> list[str]:
    _say(_bold("1. docker push, slow, through the proxy with its defaults: no limit on a transfer"))
    seen, record, balanced = _push_through_proxy(upstream, os.path.join(directory, "first.log"), [])
    _say(f"   The client got all of it, {seen.byte_count:,} bytes. The record:")
    _say(_wrapped(str(record.get("message", record))))
    _say("")
    return _differences(
        ("event", record.get("event"), "request.complete"),
        ("status", record.get("status"), 200),
        ("the response was whole", seen.whole, True),
        ("client_written", _field(record, ("bytes", "client_written")), seen.byte_count),
        ("server.stop balanced", balanced, True),
    )


def _show_forgotten_deadline(upstream: str, directory: str) -> list[str]:
    _say(_bold("2. The same push, and a forgotten 10-second deadline, shortened to 2: --client-write-deadline 2"))
    path = os.path.join(directory, "second.log")
    seen, record, balanced = _push_through_proxy(upstream, path, ["--client-write-deadline", "2"])
    last = seen.lines[-1] if seen.lines else {}
    _say("   Other proxies cut the connection without a word, and docker prints `unexpected EOF`. Here it prints:")
    _say(_wrapped(str(last.get("error", "nothing"))))
    _say("   The record in the log says it in one sentence:")
    _say(_wrapped(str(record.get("message", ""))))
    _say("   and in fields (a few of them, explained):")
    for path_in_record, explanation in _EXPLAINED:
        value = json.dumps(_field(record, path_in_record))
        _say(f"     {'.'.join(path_in_record):23} {_bold(value.ljust(25))} {explanation}")
    _say("")
    elapsed_s = _field(record, ("limit", "elapsed_s"))
    return _differences(
        ("event", record.get("event"), "request.abort"),
        ("side", record.get("side"), "client"),
        ("phase", record.get("phase"), "response_body"),
        ("cause", record.get("cause"), "deadline"),
        ("limit.name", _field(record, ("limit", "name")), "client_write_deadline"),
        ("limit.seconds", _field(record, ("limit", "seconds")), 2.0),
        ("limit.source", _field(record, ("limit", "source")), "flag"),
        ("limit.elapsed_s is 2 s or a little more", isinstance(elapsed_s, float) and 2.0 <= elapsed_s < 4.0, True),
        ("the response was whole", seen.whole, False),
        ("the last line names the limit", "client_write_deadline" in str(last.get("error")), True),
        ("client_written", _field(record, ("bytes", "client_written")), seen.byte_count),
        ("server.stop balanced", balanced, True),
    )


def _differences(*claims: tuple[str, object, object]) -> list[str]:
    return [f"{name} is {found!r}, not {expected!r}" for name, found, expected in claims if found != expected]


def _push_through_proxy(upstream: str, log: str, limits: list[str]) -> tuple[_Seen, dict[str, typing.Any], bool]:
    """Start a proxy, push once, stop it.

    Returns: what the client saw, the record, and whether the proxy's counts balanced.
    """
    settings = load_settings(
        ["--listen", "127.0.0.1:0", "--upstream", upstream, "--workers", "1", "--log-file", log, *limits], {}
    )
    proxy = _fork(lambda: serve(settings))
    try:
        host, _, port = str(_await_event(log, "server.start", proxy)["listen"]).rpartition(":")
        seen = _push(host, int(port))
    except (RuntimeError, TimeoutError, ValueError) as error:
        said = [str(event["message"]) for event in _events(log) if event["level"] == "error"]
        raise ConfigError(f"demo: {error}; the proxy's log: {said[-1] if said else 'no error'}") from error
    finally:
        _end(proxy, signal.SIGTERM)
    events = _events(log)
    records = [event for event in events if event["event"] in ("request.complete", "request.reject", "request.abort")]
    if len(records) != 1:
        raise RuntimeError(f"{len(records)} records for one request in {log}")
    return seen, records[0], any(event["event"] == "server.stop" and event["balanced"] for event in events)


def _events(log: str) -> list[dict[str, typing.Any]]:
    if not os.path.exists(log):
        return []
    with open(log, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def _await_event(log: str, name: str, pid: int) -> dict[str, typing.Any]:
    """Returns: the first event of that name. Raises: SystemExit where its process ended, which has said why."""
    give_up_at = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < give_up_at:
        for event in _events(log):
            if event["event"] == name:
                return event
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            raise SystemExit(2)
        time.sleep(0.02)
    raise RuntimeError(f"no {name} in {log} after {_GIVE_UP_S:g} s")


# -- the client ------------------------------------------------------------------------------------


def _push(host: str, port: int) -> _Seen:
    began_at = time.monotonic()
    received = bytearray()
    lines: list[dict[str, typing.Any]] = []
    whole = False
    with socket.create_connection((host, port), timeout=_GIVE_UP_S) as client:
        client.sendall(_PUSH)
        while octets := client.recv(65536):
            received += octets
            content, whole = _dechunk(bytes(received))
            for line in content.split(b"\n")[len(lines) : -1]:
                lines.append(json.loads(line))
                _say(f"   {time.monotonic() - began_at:4.1f} s  {_as_docker_prints(lines[-1])}")
    return _Seen(tuple(lines), len(received), whole)


def _dechunk(received: bytes) -> tuple[bytes, bool]:
    """Returns: the content of the whole chunks of a response so far, and whether its last chunk is among them."""
    _, _, rest = received.partition(b"\r\n\r\n")
    content = b""
    while True:
        size, line_end, rest = rest.partition(b"\r\n")
        if not line_end or len(rest) < int(size, 16) + 2:
            return content, False
        if int(size, 16) == 0:
            return content, True
        content += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


def _as_docker_prints(line: dict[str, typing.Any]) -> str:
    if "error" in line:
        return _bold(str(line["error"])[: _WIDTH - 12] + "...")
    return " ".join(
        str(line[key]) + (":" if key == "id" else "") for key in ("id", "status", "progress") if key in line
    )


# -- the upstream ----------------------------------------------------------------------------------


def _answer_pushes(listener: socket.socket) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that shows the demo; it ends this one
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                while _read_head(connection):
                    _answer_push(connection)
            except ConnectionError:
                continue  # the proxy left in the middle: the second push


def _read_head(connection: socket.socket) -> bool:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        octets = connection.recv(65536)
        if not octets:
            return False
        head += octets
    return True


def _answer_push(connection: socket.socket) -> None:
    """Answer as dockerd does: a line of progress in a chunk of its own, several times a second."""
    connection.sendall(
        b"HTTP/1.1 200 OK\r\nApi-Version: 1.41\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    for step in range(1, _PROGRESS_LINES + 1):
        time.sleep(_PROGRESS_EVERY_S)
        done = _LAYER_MB * step // _PROGRESS_LINES
        bar = ("=" * (step * 24 // _PROGRESS_LINES) + ">").ljust(25)
        progress = {"current": done * 1_000_000, "total": _LAYER_MB * 1_000_000}
        text = f"[{bar}] {done:2} MB/{_LAYER_MB} MB"
        _send_line(
            connection, {"status": "Pushing", "progressDetail": progress, "progress": text, "id": "5f70bf18a086"}
        )
    _send_line(connection, {"status": "latest: digest: sha256:" + "4c" * 32 + " size: 528"})
    connection.sendall(b"0\r\n\r\n")


def _send_line(connection: socket.socket, line: dict[str, object]) -> None:
    octets = json.dumps(line).encode("ascii") + b"\r\n"
    connection.sendall(b"%x\r\n%b\r\n" % (len(octets), octets))


# -- processes and words ---------------------------------------------------------------------------


def _fork(run: collections.abc.Callable[[], int]) -> int:
    """Run a function in a process of its own. Returns: its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = run()
    except (ConfigError, OSError) as error:
        print_line(f"proxy: error: {error}")
    except Exception:  # noqa: BLE001  # the process ends here, and must not run on in its parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


def _end(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process of ours, and wait until it is gone."""
    os.kill(pid, number)
    os.waitpid(pid, 0)


def _field(record: dict[str, typing.Any], path: tuple[str, ...]) -> object:
    value: typing.Any = record
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def show(text: str) -> None:
    """Write to standard output. Raises: BrokenPipeError where the reader has left; else ConfigError."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # The rest goes nowhere: what is in the buffer would fail once more, noisily, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ConfigError(f"standard output can't be written: {error.strerror}; check where it goes") from error


def _say(text: str) -> None:
    show(text + "\n")


def _wrapped(text: str) -> str:
    return "\n".join(
        textwrap.wrap(text, _WIDTH, initial_indent="     ", subsequent_indent="     ", break_on_hyphens=False)
    )


def _bold(text: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"
