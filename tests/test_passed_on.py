"""One small portion after the other, each read and written on its own: a line of a response now and then, a keystroke
in a tunnel. What arrives, what ends it, and what the record says do not depend on how short the way was that each took.
"""

import collections.abc
import contextlib
import errno
import fcntl
import os
import queue
import re
import signal
import socket
import struct
import termios
import threading
import time
import types
import typing

import pytest

import harness
from conftest import Certificates
from harness import LogRecord, ProxyProcess
from peers import PeerGone, Upstream, Wire, chunk, connect
from proxy.aborts import Abort
from proxy.config import load_settings
from proxy.endpoint import READABLE
from proxy.framing import ConnectionFraming
from proxy.relay import Bustle, Flow, Relay
from proxy.vocabulary import Cause, Operation, Phase, Side

_GET = b"GET /x HTTP/1.1\r\nHost: t\r\n\r\n"
_UPGRADE = b"GET /x HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
_HEADS = {
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n",
    "to the end": b"HTTP/1.1 200 OK\r\n\r\n",
    "tunnel": b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n",
}
_KINDS = tuple(_HEADS)


class Scene:
    """An exchange whose two peers are in the hands of the test: ``head`` has gone from upstream to the client."""

    def __init__(self, kind: str, client: Wire, upstream: Wire, proxy: ProxyProcess, head: bytes) -> None:
        self.kind = kind
        self.client = client
        self.upstream = upstream
        self.proxy = proxy
        upstream.send(head)
        self.head = client.read_head()
        self.content = 0  # of the response, that has come through

    def frame(self, content: bytes) -> bytes:
        """Returns: the octets that carry the content."""
        return chunk(content) if self.kind == "chunked" else content

    def line(self, content: bytes = b"one line\n") -> None:
        """Let upstream say something, and wait until the client has it."""
        octets = self.frame(content)
        self.upstream.send(octets)
        assert self.client.read_exactly(len(octets)) == octets
        self.content += len(content)

    def lines(self, count: int = 3) -> None:
        """Let upstream say some lines."""
        for number in range(count):
            self.line(b"line %d\n" % number)

    def key(self, octets: bytes = b"k") -> None:
        """Let the client say something, and wait until upstream has it."""
        self.client.send(octets)
        assert self.upstream.read_exactly(len(octets)) == octets

    def record(self) -> LogRecord:
        """Wait for the record. Returns: it, checked."""
        record = self.proxy.next_request()
        harness.check_record(record)
        return record


@contextlib.contextmanager
def _scene(
    kind: str,
    *options: str,
    request: bytes | None = None,
    head: bytes | None = None,
    upstream_kind: str = "tcp",
    listen: str = "127.0.0.1:0",
    client_tls: bool = False,
    certificates: Certificates | None = None,
    receive_buffer: int | None = None,
) -> collections.abc.Iterator[Scene]:
    wires: queue.Queue[Wire] = queue.Queue()
    over = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_head()
        wires.put(wire)
        assert over.wait(60)

    tls = context = None
    if certificates is not None:
        tls = certificates.server_context() if upstream_kind == "tls" else None
        context = certificates.client_context() if client_tls else None
        options += ("--tls-cert", certificates.server) if client_tls else ()
        options += ("--upstream-ca", certificates.ca) if upstream_kind == "tls" else ()
    with Upstream(script, upstream_kind, tls=tls) as upstream:
        try:
            with (
                ProxyProcess(upstream.url, *options, listen=listen) as proxy,
                connect(proxy.address, context, receive_buffer=receive_buffer) as client,
            ):
                client.send(request or (_UPGRADE if kind == "tunnel" else _GET))
                yield Scene(kind, client, wires.get(timeout=10), proxy, head or _HEADS[kind])
        finally:
            over.set()


def _content(kind: str, octets: bytes) -> bytes:
    """Returns: the content in what is the beginning of a body."""
    if kind != "chunked":
        return octets
    content = b""
    while octets:
        line, _, octets = octets.partition(b"\r\n")
        size = int(line or b"0", 16)
        content += octets[:size]
        octets = octets[size + 2 :]
    return content


def _fill(wire: Wire, portion: bytes) -> int:
    """As an upstream on a unix socket, say the portion, each time when the last one was read, until it is not read.

    Returns: how often it was said.
    """
    for count in range(1, 1000):
        wire.send(portion)
        until = time.monotonic() + 0.2
        while struct.unpack("=i", fcntl.ioctl(wire.sock, termios.TIOCOUTQ, b"\0" * 4))[0]:
            if time.monotonic() > until:
                return count
            time.sleep(0.0005)
    raise AssertionError("all of it was read")


@pytest.mark.parametrize("kind", _KINDS)
def test_what_a_killed_worker_had_passed_on(kind: str) -> None:
    with _scene(kind) as scene:
        scene.lines()
        keys = 0
        if kind == "tunnel":
            scene.key(b"ab")
            scene.line()
            scene.key(b"c")
            keys = 3
        time.sleep(0.2)  # in which the worker comes to wait again
        (worker,) = scene.proxy.worker_pids()
        os.kill(worker, signal.SIGKILL)
        record = scene.record()
        counts = record["bytes"]
        assert (record["side"], record["cause"], record["status"]) == ("proxy", "internal", 101 if keys else 200)
        assert (counts["request_body"], counts["response_body"]) == (keys, scene.content)
        assert (counts["client_written"], counts["upstream_read"]) == (
            scene.client.received.count,
            scene.upstream.sent.count,
        )
        assert (counts["client_read"], counts["upstream_written"]) == (
            scene.client.sent.count,
            scene.upstream.received.count,
        )


def test_a_killed_worker_is_not_said_to_have_sent_more_than_was_announced() -> None:
    """A docker exec announces two octets of options, and then asks for a tunnel."""
    request = (
        b"POST /exec/a/start HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 2\r\n\r\n{}"
    )
    with _scene("tunnel", request=request) as scene:
        assert scene.upstream.read_exactly(2) == b"{}"
        scene.key(b"some keys")
        scene.line()
        time.sleep(0.2)  # in which the worker comes to wait again
        (worker,) = scene.proxy.worker_pids()
        os.kill(worker, signal.SIGKILL)
        record = scene.record()
        assert (record["phase"], record["expected"]["request_body"]) == ("tunnel", 2)
        names = f"client {record['client']} to upstream {record['upstream']}"
        assert record["message"].endswith(f": 11 bytes had passed from {names}, 9 bytes back"), record["message"]


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("who", ["client", "upstream"])
def test_a_reset_behind_some_portions(who: str, kind: str) -> None:
    with _scene(kind) as scene:
        time.sleep(0.2)
        scene.lines()
        if kind == "tunnel":
            scene.key()
        (scene.client if who == "client" else scene.upstream).reset()
        record = scene.record()
        phase = "tunnel" if kind == "tunnel" else "response_body"
        assert (record["side"], record["phase"], record["operation"]) == (who, phase, "read")
        assert (record["cause"], record["exception"]["errno"]) == ("reset", "ECONNRESET")
        assert record["bytes"]["response_body"] == scene.content
        assert record["bytes"]["client_written"] == scene.client.received.count
        assert record["bytes"]["upstream_read"] == scene.upstream.sent.count
        assert record["bytes"]["request_body"] == (1 if kind == "tunnel" else 0)
        # The last octets moved behind the pause.
        pauses = {"upstream_read", "client_write"} | ({"client_read", "upstream_write"} if kind == "tunnel" else set())
        assert set(record["stalled_s"]) == pauses
        for stalled in record["stalled_s"].values():
            assert stalled < record["duration_s"] - 0.15


@pytest.mark.parametrize("kind", ["chunked", "length", "to the end"])
@pytest.mark.parametrize("who", ["client", "upstream"])
def test_an_end_behind_some_portions(who: str, kind: str) -> None:
    with _scene(kind) as scene:
        scene.lines()
        (scene.client if who == "client" else scene.upstream).end_write()
        record = scene.record()
        if (who, kind) == ("upstream", "to the end"):
            assert record["event"] == "request.complete"
            assert scene.client.await_end() == "fin"
        else:
            assert (record["side"], record["phase"], record["cause"]) == (who, "response_body", "closed")
        assert record["bytes"]["response_body"] == scene.content


def test_each_side_of_a_tunnel_ends_in_its_turn() -> None:
    with _scene("tunnel") as scene:
        for number in range(4):
            scene.key(b"key %d" % number)
            scene.line()
        scene.key(os.urandom(200_000))  # more than a read takes
        scene.client.end_write()
        assert scene.upstream.await_end() == "fin"
        scene.lines()
        scene.upstream.end_write()
        assert scene.client.await_end() == "fin"
        record = scene.record()
        assert record["event"] == "request.complete"
        assert (record["bytes"]["request_body"], record["bytes"]["response_body"]) == (200_020, scene.content)

    with _scene("tunnel") as scene:
        scene.lines()
        scene.upstream.end_write()
        assert scene.client.await_end() == "fin"
        scene.key(b"late")
        scene.key(b"later")
        scene.client.end_write()
        assert scene.upstream.await_end() == "fin"
        assert scene.record()["bytes"]["request_body"] == 9


def test_a_tunnel_with_one_end_is_as_old_as_it_is() -> None:
    """A docker attach without standard input ends its side at once, and may go on for days."""
    with _scene("tunnel") as scene:
        began_at = time.monotonic()
        scene.client.end_write()
        assert scene.upstream.await_end() == "fin"
        time.sleep(0.3)
        shown = scene.proxy.wait_in_flight()
        assert shown["duration_s"] > 0.3
        assert shown["duration_s"] < time.monotonic() - began_at + 1
        (said,) = re.findall(r"runs for ([0-9.]+) s", shown["message"])
        assert abs(float(said) - shown["duration_s"]) <= 0.06
        scene.upstream.end_write()
        assert scene.client.await_end() == "fin"
        assert scene.record()["event"] == "request.complete"


def test_both_directions_at_once() -> None:
    with _scene("tunnel") as scene:
        said = [os.urandom(997), os.urandom(997)]

        def say(wire: Wire, octets: bytes) -> None:
            for at in range(len(octets)):
                wire.send(octets[at : at + 1])

        threads = [
            threading.Thread(target=say, args=pair) for pair in zip((scene.client, scene.upstream), said, strict=True)
        ]
        for thread in threads:
            thread.start()
        assert scene.upstream.read_exactly(997) == said[0]
        assert scene.client.read_exactly(997) == said[1]
        for thread in threads:
            thread.join()
        scene.client.reset()
        counts = scene.record()["bytes"]
        assert (counts["request_body"], counts["response_body"]) == (997, 997)


# Portions that are not one whole chunk, each in parts that are sent one by one; the content of all of it.
_ODD: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "two chunks": ((chunk(b"one") + chunk(b"two"),), b"onetwo"),
    "with an extension": ((b"3;a=b\r\nfoo\r\n",), b"foo"),
    "with zeros": ((b"000003\r\nfoo\r\n", b"0000000003\r\nfoo\r\n"), b"foofoo"),
    "a chunk within a chunk": ((b"b\r\n", chunk(b"inside"), b"\r\n"), chunk(b"inside")),
    "its size in parts": ((b"1", chunk(b"inside"), b"x" * 14 + b"\r\n"), b"inside\r\n" + b"x" * 14),
    "longer than what came": ((b"5\r\nfoo\r\n", b"\r\n"), b"foo\r\n"),
    "its end late": ((b"3\r\nfoo", b"\r", b"\n"), b"foo"),
    "more than one read": ((chunk(b"y" * 70_000),), b"y" * 70_000),
}


def test_a_portion_that_is_not_one_chunk() -> None:
    with _scene("chunked") as scene:
        for name, (parts, content) in _ODD.items():
            scene.lines(2)
            for part in parts:
                scene.upstream.send(part)
                time.sleep(0.02)
            assert scene.client.read_exactly(sum(map(len, parts))) == b"".join(parts), name
            scene.content += len(content)
        scene.lines()
        scene.upstream.send(b"0\r\n\r\n")
        assert scene.client.read_exactly(5) == b"0\r\n\r\n"
        record = scene.record()
        assert record["event"] == "request.complete"
        assert record["bytes"]["response_body"] == scene.content


@pytest.mark.parametrize("last", [b"0\r\n\r\n", b"0\r\nX-Sum: 7\r\n\r\n"])
def test_the_end_with_the_last_portion(last: bytes) -> None:
    with _scene("chunked") as scene:
        scene.lines()
        scene.upstream.send(chunk(b"bye") + last + b"excess")
        octets = chunk(b"bye") + last
        assert scene.client.read_exactly(len(octets)) == octets
        record = scene.record()
        assert record["event"] == "request.complete"
        assert record["bytes"]["response_body"] == scene.content + 3
        assert record["bytes"]["client_written"] == scene.client.received.count


@pytest.mark.parametrize("excess", [b"", b"excess"])
def test_the_end_of_a_body_with_a_length(excess: bytes) -> None:
    with _scene("length", head=b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n") as scene:
        scene.lines(2)
        scene.upstream.send(b"8 octets" + excess)
        assert scene.client.read_exactly(8) == b"8 octets"
        record = scene.record()
        assert (record["event"], record["bytes"]["response_body"]) == ("request.complete", 22)


@pytest.mark.parametrize(
    "octets", [b"zz\r\nfoo\r\n", b"3\nfoo\r\n", b"3\r\nfooo\r\n", b"3\r\nfoo\n\r", b"-3\r\nfoo\r\n"]
)
def test_malformed_chunks_behind_some_portions(octets: bytes) -> None:
    with _scene("chunked") as scene:
        scene.lines()
        before = scene.client.received.count
        scene.upstream.send(octets)
        record = scene.record()
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "response_body", "protocol")
        assert record["bytes"]["response_body"] == scene.content
        assert record["bytes"]["upstream_read"] == scene.upstream.sent.count
        scene.client.await_end()
        assert scene.client.received.count == before


# What a client's socket does not take whole it takes in part over TCP, and small as it is not at all on a unix socket.
_TOO_MUCH = [(kind, "127.0.0.1:0", 50_001) for kind in _KINDS] + [
    (kind, "unix", 101) for kind in _KINDS if kind != "to the end"
]


@pytest.mark.parametrize(("kind", "listen", "size"), _TOO_MUCH)
def test_a_client_that_stops_reading_has_not_got_what_waits(kind: str, listen: str, size: int) -> None:
    with _scene(kind, upstream_kind="unix", listen=listen, receive_buffer=8192) as scene:
        portion = scene.frame(os.urandom(size))
        count = _fill(scene.upstream, portion)
        if kind == "tunnel":  # the other direction goes on meanwhile
            scene.key()
            scene.key()
            time.sleep(0.1)
        (worker,) = scene.proxy.worker_pids()
        os.kill(worker, signal.SIGKILL)
        counts = scene.record()["bytes"]
        written = (portion * count)[: counts["client_written"] - len(scene.head)]
        assert 0 < len(written) < len(portion) * count
        assert counts["response_body"] == len(_content(kind, written))
        assert counts["request_body"] == (2 if kind == "tunnel" else 0)


@pytest.mark.parametrize(
    ("kind", "client"), [("chunked", "tcp"), ("tunnel", "tcp"), ("chunked", "tls"), ("length", "unix")]
)
def test_a_client_that_reads_on_gets_everything(kind: str, client: str, certificates: Certificates) -> None:
    listen = "unix" if client == "unix" else "127.0.0.1:0"
    size = 101 if client == "unix" else 50_001
    scene_of = _scene(
        kind,
        upstream_kind="unix",
        listen=listen,
        receive_buffer=8192,
        client_tls=client == "tls",
        certificates=certificates,
    )
    with scene_of as scene:
        for _ in range(2):
            portion = scene.frame(os.urandom(size))
            count = _fill(scene.upstream, portion)
            assert scene.client.read_exactly(count * len(portion)) == portion * count
            scene.content += count * size
            scene.lines()
        scene.client.reset()
        assert scene.record()["bytes"]["response_body"] == scene.content


def test_an_upstream_that_reads_on_gets_all_keys() -> None:
    """The other direction of a tunnel; its client is on a unix socket, where one sees what was read."""
    with _scene("tunnel", listen="unix") as scene:
        scene.lines()
        portion = os.urandom(50_001)
        count = _fill(scene.client, portion)
        scene.lines()
        assert scene.upstream.read_exactly(count * len(portion)) == portion * count
        scene.key()
        scene.upstream.reset()
        assert scene.record()["bytes"]["request_body"] == count * len(portion) + 1


@pytest.mark.parametrize("kind", ["chunked", "tunnel"])
def test_a_client_that_stops_reading_meets_the_limit_for_it(kind: str) -> None:
    name = "tunnel_timeout" if kind == "tunnel" else "client_write_timeout"
    option = "--" + name.replace("_", "-")
    with _scene(kind, option, "0.5", upstream_kind="unix", receive_buffer=8192) as scene:
        _fill(scene.upstream, scene.frame(os.urandom(50_001)))
        record = scene.record()
        side = "proxy" if kind == "tunnel" else "client"
        assert (record["side"], record["cause"], record["limit"]["name"]) == (side, "timeout", name)


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_each_portion_is_progress_and_silence_behind_it_is_none(who: str) -> None:
    option = "--tunnel-timeout" if who == "client" else "--upstream-read-timeout"
    with _scene("tunnel" if who == "client" else "chunked", option, "0.9") as scene:
        for _ in range(5):
            if who == "client":
                scene.key()
            else:
                scene.line()
            time.sleep(0.3)
        record = scene.record()
        assert (record["side"], record["cause"]) == ("proxy" if who == "client" else "upstream", "timeout")
        counts = record["bytes"]
        assert (counts["request_body"], counts["response_body"]) == (5 if who == "client" else 0, scene.content)


@pytest.mark.parametrize("ends", ["deadline", "drain"])
def test_portions_without_end_do_not_hold_off_what_ends_them(ends: str) -> None:
    options = ("--upstream-read-deadline", "0.5") if ends == "deadline" else ("--drain-timeout", "0.3")
    with _scene("length", *options) as scene:
        scene.lines()
        if ends == "drain":
            scene.proxy.send_signal(signal.SIGTERM)
        with contextlib.suppress(AssertionError, ConnectionError, PeerGone):
            for _ in range(1000):
                scene.line()
                time.sleep(0.01)
        record = scene.record()
        if ends == "drain":
            assert (record["side"], record["cause"]) == ("proxy", "shutdown")
            assert record["socket"]["client"] is not None  # the worker itself saw that its time was up
        else:
            assert (record["side"], record["limit"]["name"]) == ("upstream", "upstream_read_deadline")
        assert record["bytes"]["client_written"] == scene.client.received.count


@pytest.mark.parametrize(
    ("client_tls", "upstream_kind"),
    [(False, "tcp"), (True, "tcp"), (False, "tls")],
    ids=["plain", "client", "upstream"],
)
@pytest.mark.parametrize("kind", ["chunked", "tunnel"])
def test_a_trickle_becomes_a_stream_and_a_trickle_again(
    kind: str, client_tls: bool, upstream_kind: str, certificates: Certificates
) -> None:
    with _scene(kind, upstream_kind=upstream_kind, client_tls=client_tls, certificates=certificates) as scene:
        for _ in range(2):
            scene.lines()
            content = os.urandom(1_500_000)
            sender = threading.Thread(target=scene.upstream.send, args=(scene.frame(content),))
            sender.start()
            assert scene.client.read_exactly(len(scene.frame(content))) == scene.frame(content)
            sender.join()
            scene.content += len(content)
            if kind == "tunnel":
                scene.key(b"key")
                scene.key(content[:200_000])
        scene.lines()
        scene.client.reset()
        record = scene.record()
        assert record["bytes"]["response_body"] == scene.content
        assert record["bytes"]["request_body"] == (400_006 if kind == "tunnel" else 0)


def test_lines_for_a_client_without_chunks_and_for_one_on_a_unix_socket() -> None:
    with _scene("chunked", request=b"GET /x HTTP/1.0\r\n\r\n") as scene:
        for _ in range(3):
            scene.upstream.send(chunk(b"a line\n"))
            assert scene.client.read_exactly(7) == b"a line\n"
        scene.upstream.reset()
        record = scene.record()
        assert (record["side"], record["bytes"]["response_body"]) == ("upstream", 21)

    with _scene("to the end", listen="unix") as scene:
        for _ in range(3):
            scene.upstream.send(b"a line\n")
            assert scene.client.read_exactly(12) == chunk(b"a line\n")
        scene.upstream.end_write()
        assert scene.client.read_exactly(5) == b"0\r\n\r\n"
        assert scene.record()["bytes"]["response_body"] == 21


@pytest.mark.parametrize("last", [b"{}\n", b"{"])
def test_a_message_stream_is_told_its_error_behind_whole_lines_alone(last: bytes) -> None:
    request = b"POST /build HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\n\r\n"
    head = _HEADS["chunked"].replace(b"\r\n\r\n", b"\r\nContent-Type: application/json\r\n\r\n")
    with _scene("chunked", request=request, head=head) as scene:
        scene.line(b"{}\n")
        scene.line(last)
        scene.upstream.reset()
        rest = scene.client.read_to_end()
        assert scene.record()["side"] == "upstream"
        assert (b"errorDetail" in rest) is (last == b"{}\n")


def test_an_upload_in_portions_beside_its_response() -> None:
    """What the client says is the body of its request, and bounded as such."""
    request = b"POST /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
    with _scene("chunked", "--max-body-size", "20", request=request) as scene:
        for _ in range(2):
            scene.key(chunk(b"10 octets!"))
            scene.line()
        scene.client.send(chunk(b"!"))
        record = scene.record()
        assert (record["side"], record["limit"]["name"]) == ("client", "max_body_size")
        assert (record["bytes"]["request_body"], record["bytes"]["response_body"]) == (20, scene.content)


# -- what it takes stand-ins for peers to see --------------------------------------------------------------------------


class Peer:
    """An endpoint as far as a portion needs one: a plain socket, or one under TLS whose write has read."""

    has_unread = False
    is_tls = False
    sock = types.SimpleNamespace(family=socket.AF_UNIX)

    def __init__(self, side: Side) -> None:
        self.side = side

    def read(self, size: int, flags: int) -> bytes:
        """Returns: a keystroke."""
        return b"k"

    def write(self, octets: bytes, flags: int) -> int:
        """Take all; on the way the peer's last words of a handshake came, and content behind them."""
        self.has_unread = True
        return len(octets)


def _tunnel(client: Peer, upstream: Peer) -> Relay:
    def wait_again() -> typing.NoReturn:
        raise AssertionError("waits for what is there already")

    relay = Relay.__new__(Relay)
    endpoints: tuple[typing.Any, typing.Any] = client, upstream
    relay.client, relay.upstream = endpoints
    relay.request, relay.response = Flow(ConnectionFraming()), Flow(ConnectionFraming())
    relay.request.source, relay.request.sink = endpoints
    relay.response.sink, relay.response.source = endpoints
    waiter: typing.Any = types.SimpleNamespace(
        watches=[], slot=types.SimpleNamespace(count=lambda *_: None), wait_again=wait_again
    )
    relay.waiter = waiter
    relay.tunnel = True
    relay.broken = None
    relay._bustle = Bustle(memoryview(bytearray(8)).cast("d"), 0)
    relay._bustles_from = 0.0
    return relay


def test_a_write_that_has_read_is_no_time_to_wait() -> None:
    """Under TLS 1.2, where upstream shakes hands anew."""
    relay = _tunnel(Peer(Side.CLIENT), Peer(Side.UPSTREAM))
    assert relay._pass_on(READABLE, 0, 1.0) == (0, 0, 1.0)
    assert relay.request.written == 1
    assert not relay.request.pending


def test_the_error_of_a_read_behind_a_broken_write_is_not_held() -> None:
    """Its traceback holds the relay, and of the first error alone the record lets go."""
    upstream = Peer(Side.UPSTREAM)

    def read(size: int, flags: int) -> bytes:
        raise ConnectionResetError

    upstream.read = read  # type: ignore[method-assign]
    relay = _tunnel(Peer(Side.CLIENT), upstream)
    first = BrokenPipeError()
    relay.broken = Abort(Side.UPSTREAM, Phase.TUNNEL, Operation.WRITE, Cause.RESET, original=first)
    with pytest.raises(Abort) as caught:
        relay._pass_on(0, READABLE, 1.0)
    assert caught.value is relay.broken
    assert caught.value.__cause__ is first


def test_a_reset_between_poll_and_write() -> None:
    """The error is told once: who asks again gets none."""
    client, upstream = Peer(Side.CLIENT), Peer(Side.UPSTREAM)

    def write(octets: bytes, flags: int) -> int:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    client.write = upstream.write = write  # type: ignore[method-assign]
    relay = _tunnel(client, upstream)
    relay.settings = load_settings(["--upstream", "http://127.0.0.1:1"], {})
    relay.upstream_usable, relay.events = True, []
    relay._pass_on(READABLE, 0, 1.0)
    assert relay.broken is not None
    assert (relay.broken.side, relay.broken.cause) == (Side.UPSTREAM, Cause.RESET)
    assert relay.request.relayed_content() == 0
    with pytest.raises(Abort) as caught:
        relay._pass_on(0, READABLE, 1.0)
    assert (caught.value.side, caught.value.operation) == (Side.CLIENT, Operation.WRITE)
    assert relay.response.relayed_content() == 0
