"""What happens to a request: one row for each way it can go, with the whole record that must tell it.

A row is what the client does, what upstream does, and the options; each runs over plain TCP, TLS towards the client,
TLS towards upstream, and unix sockets. Fields on which docs/records.md is silent are left open in a row. Octet counts are
compared with what the peers saw.
"""

import collections
import collections.abc
import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import select
import signal
import socket
import ssl
import threading
import time
import typing

import pytest

import harness
import peers
from conftest import Certificates
from peers import Response, Upstream, Wire, answer, answer_and_close, chunk, ok

Seen = Response | list[Response] | None
ClientScript = collections.abc.Callable[[Wire, "Stage"], Seen]

BODY = bytes(range(256)) * 4
HUGE = b"0123456789abcdef" * (1024 * 1024)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"
LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"
JSON_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
RAW_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
UPGRADE = "Connection: Upgrade\r\nUpgrade: tcp\r\n"

# (towards the client, towards upstream)
PLAIN = ("plain", "tcp")
TLS_CLIENT = ("tls", "tcp")
TLS_UPSTREAM = ("plain", "tls")
UNIX = ("unix", "unix")
ALL = (PLAIN, TLS_CLIENT, TLS_UPSTREAM, UNIX)
# A unix socket has no reset; what comes nearest is an end.
RESETS = (PLAIN, TLS_CLIENT, TLS_UPSTREAM)
LIMIT_S = 0.2
# How much later than its limit an abort may be recorded: this machine may be busy.
LATE_S = 2.0
OPEN: typing.Any = object()  # the contract does not say


@dataclasses.dataclass(frozen=True)
class Row:
    """One scenario. What the record must say is OPEN where the contract does not."""

    name: str
    client: ClientScript
    upstream: peers.Script
    options: tuple[str, ...] = ()
    event: str | None = "complete"  # None: no request began
    status: int | None = OPEN
    side: str = OPEN
    phase: str = OPEN
    operation: str | None = OPEN
    cause: str = OPEN
    limit: str | None = None
    error_type: str | None = OPEN
    whole: bool | None = None  # whether what the client got looks like a whole message
    client_end: tuple[str, ...] = ()  # how the client saw its connection end
    upstream_end: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()  # counts that must equal what the peers saw, besides those that always must
    body: tuple[int, int] | None = None  # content relayed, both ways
    records: int = 1  # all but the last are complete
    over: tuple[tuple[str, str], ...] = ALL
    url: collections.abc.Callable[[], typing.ContextManager[str]] | None = None  # in place of the upstream's
    reached: bool | None = True  # whether upstream was; None: open
    receive_buffer: int | None = None  # of the client
    within_s: float = 3.0  # from the client's first octet to the end of it all

    def __str__(self) -> str:
        return self.name


class Stage:
    """Proxies and upstreams for all rows: a proxy serves every row with its options."""

    _KEPT = 4

    def __init__(self, certificates: Certificates) -> None:
        self.certificates = certificates
        self.client_context = certificates.client_context()
        tls = certificates.server_context()
        self.upstreams = {
            kind: Upstream(
                peers.silent,
                kind,
                tls=tls if kind == "tls" else None,
                receive_buffer=65536 if kind != "unix" else None,
                send_buffer=65536 if kind != "unix" else None,
            )
            for kind in ("tcp", "tls", "unix")
        }
        self._proxies: collections.OrderedDict[tuple[object, ...], harness.ProxyProcess] = collections.OrderedDict()
        self.upstream: Upstream = self.upstreams["tcp"]
        self.proxy: harness.ProxyProcess

    def use(
        self, url: str, towards_client: str, options: tuple[str, ...], form: str = "package"
    ) -> harness.ProxyProcess:
        """Returns: a proxy in that form with these options, started if there is none."""
        key = (url, towards_client, options, form)
        if key in self._proxies:
            self._proxies.move_to_end(key)
        else:
            while len(self._proxies) >= self._KEPT:
                self._drop(next(iter(self._proxies)))
            certificate = self.certificates.server
            more = ["--tls-cert", certificate, "--tls-key", certificate] if towards_client == "tls" else []
            more += ["--upstream-ca", self.certificates.ca] if url.startswith("https") else []
            listen = "unix" if towards_client == "unix" else "127.0.0.1:0"
            self._proxies[key] = harness.ProxyProcess(url, *options, *more, listen=listen, form=form)
        self.proxy = self._proxies[key]
        return self.proxy

    def _drop(self, key: tuple[object, ...]) -> None:
        proxy = self._proxies.pop(key)
        with proxy:
            pass  # stops it, and checks its balance

    def discard(self) -> None:
        """Remove the proxy of a row that failed."""
        for key, proxy in list(self._proxies.items()):
            if proxy is self.proxy:
                del self._proxies[key]
                proxy.kill()
                proxy.remove()

    def close(self) -> None:
        """Stop all."""
        try:
            while self._proxies:
                self._drop(next(iter(self._proxies)))
        finally:
            for upstream in self.upstreams.values():
                upstream.close()


@pytest.fixture(scope="module")
def stage(certificates: Certificates) -> collections.abc.Iterator[Stage]:
    stage = Stage(certificates)
    yield stage
    stage.close()


# -- what clients do --------------------------------------------------------------------------------------------------


def request(octets: bytes, method: str = "GET") -> ClientScript:
    """Send octets until an answer comes, read one response, if there is one, and see how the connection goes on."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send_until_answered(octets)
        return _finish(wire, method)

    return script


def _finish(wire: Wire, method: str = "GET") -> Response | None:
    try:
        response = wire.read_response(method)
    except peers.PeerGone:
        return None
    if not response.whole or response.get("connection") == b"close":
        wire.await_end()
    return response


def get(target: str = "/", extra: str = "", method: str = "GET", host: str = "test", version: str = "1.1") -> bytes:
    """Returns: a request without a body."""
    return f"{method} {target} HTTP/{version}\r\nHost: {host}\r\n{extra}\r\n".encode()


def post(body: bytes = BODY, target: str = "/", extra: str = "", length: int | None = None) -> bytes:
    """Returns: a request with a body, or the part of it that ``body`` is."""
    size = len(body) if length is None else length
    return f"POST {target} HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n{extra}\r\n".encode() + body


def post_chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", target: str = "/") -> bytes:
    """Returns: a request with a chunked body."""
    head = f"POST {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(map(chunk, chunks)) + end


def several(*requests: bytes, pipelined: bool = False) -> ClientScript:
    """Send several requests on one connection, and read a response to each."""

    def script(wire: Wire, stage: Stage) -> Seen:
        if pipelined:
            wire.send(b"".join(requests))
            return [wire.read_response() for _ in requests]
        responses = []
        for octets in requests:
            wire.send(octets)
            responses.append(wire.read_response())
        return responses

    return script


def leave(octets: bytes, how: str, after: str = "sent") -> ClientScript:
    """Send octets, then leave: ``fin`` (under TLS with close_notify), ``cut`` (without), ``reset``.

    ``after``: once the octets are ``sent``, upstream has ``seen`` a head, or a response ``head`` or some of its
    ``body`` has come.
    """

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(octets)
        if after == "seen":
            stage.upstream.await_head()
        elif after in ("head", "body"):
            wire.read_head()
            if after == "body":
                wire.read_exactly(4)
        elif how == "reset":
            _let_read()  # a reset destroys what was not read yet
        if how == "reset":
            wire.reset()
        else:
            (wire.end_write if how == "fin" else wire.cut_write)()
            wire.await_end()
        return None

    return script


def _let_read() -> None:
    """Leave the other side time to read what was sent: that it has shows nowhere."""
    time.sleep(0.05)


def stop_reading(octets: bytes) -> ClientScript:
    """Send a request and read nothing of its response until the proxy has ended it."""

    def script(wire: Wire, stage: Stage) -> Seen:
        before = len(stage.proxy.requests())
        wire.send(octets)
        stage.proxy.wait_requests(before + 1)
        wire.await_end()
        return None

    return script


def stop_sending(octets: bytes) -> ClientScript:
    """Send part of a request and wait for what comes."""
    return request(octets)


def drip(octets: bytes, size: int, pause_s: float) -> ClientScript:
    """Send a request a few octets at a time."""

    def script(wire: Wire, stage: Stage) -> Seen:
        with contextlib.suppress(peers.PeerGone):  # the point of the row
            wire.send_in_parts(octets, size, pause_s)
        return _finish(wire)

    return script


def drip_until_end(octets: bytes, endless: bytes, pause_s: float) -> ClientScript:
    """Send a request, then a little now and then until there is an answer or an end."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(octets)
        until = time.monotonic() + 5
        while not select.select([wire.sock], [], [], pause_s)[0]:
            assert time.monotonic() < until, "nothing ended it"
            with contextlib.suppress(peers.PeerGone):  # then there is something to read, too
                wire.send(endless)
        return _finish(wire)

    return script


def read_slowly(octets: bytes, size: int, pause_s: float, total_s: float | None = None) -> ClientScript:
    """Read the response a little at a time, to its end or for some seconds and then at once."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(octets)
        began_at = time.monotonic()
        while wire.read(size):
            if total_s is None or time.monotonic() < began_at + total_s:
                time.sleep(pause_s)
        return None

    return script


def expect_continue(body: bytes) -> ClientScript:
    """Send a head, wait for 100, then send the body."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(post(b"", extra="Expect: 100-continue\r\n", length=len(body)))
        interim = wire.read_response()
        if interim.status != 100:
            return interim
        wire.send(body)
        return [interim, wire.read_response()]

    return script


def silent_behind_continue(wire: Wire, stage: Stage) -> Seen:
    """Wait for 100, and then say nothing more."""
    wire.send(post(b"", extra="Expect: 100-continue\r\n", length=10))
    assert wire.read_response().status == 100
    return _finish(wire)


def interim_then_final(octets: bytes) -> ClientScript:
    """Read an interim response and the final one."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(octets)
        return [wire.read_response(), wire.read_response()]

    return script


def tunnel(head: bytes, octets: bytes, how: str = "fin") -> ClientScript:
    """Upgrade, exchange octets, then end in some way, or wait for the end."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(head)
        wire.read_head()
        if octets:
            wire.send(octets)
            assert wire.read_exactly(len(octets)) == octets
        if how == "reset":
            wire.reset()
            return None
        if how in ("fin", "cut"):
            (wire.end_write if how == "fin" else wire.cut_write)()
        wire.await_end()
        return None

    return script


def half_close(octets: bytes) -> ClientScript:
    """Send a request and a FIN at once, then read what comes."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send_and_end(octets)
        return _finish(wire)

    return script


def only_connect(wire: Wire, stage: Stage) -> Seen:
    """Connect and leave without a byte."""


def idle_after(octets: bytes) -> ClientScript:
    """Send a request, then wait on the idle connection until the proxy ends it."""

    def script(wire: Wire, stage: Stage) -> Seen:
        wire.send(octets)
        response = wire.read_response()
        wire.await_end()
        return response

    return script


def wait_idle(wire: Wire, stage: Stage) -> Seen:
    """Send nothing, and wait until the proxy ends the connection."""
    wire.await_end()
    return None


# -- what upstreams do that peers.py has not ---------------------------------------------------------------------------


def send_then_stall(octets: bytes) -> peers.Script:
    """Answer in part, then say nothing more."""
    return peers.answer_and_wait(octets)


def in_two(first: bytes, second: bytes) -> peers.Script:
    """Answer in two parts, so that the first is relayed before the second comes."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(first)
        time.sleep(0.1)  # together they would be judged as one
        wire.send(second)
        wire.await_end()

    return script


def continue_late(pause_s: float, response: bytes) -> peers.Script:
    """Let the client wait for its 100."""

    def script(wire: Wire) -> None:
        head = wire.read_head()
        time.sleep(pause_s)
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        wire.read_exactly(int(peers.first_value(peers.split_fields(head), b"content-length") or b"0"))
        wire.send(response)
        wire.end_write()

    return script


def read_late(pause_s: float, response: bytes) -> peers.Script:
    """Leave the request body unread for a while."""

    def script(wire: Wire) -> None:
        head = wire.read_head()
        time.sleep(pause_s)
        wire.read_exactly(int(peers.first_value(peers.split_fields(head), b"content-length") or b"0"))
        wire.send(response)
        wire.end_write()

    return script


def read_slow(size: int, pause_s: float, total_s: float) -> peers.Script:
    """Read a request a little at a time, and what is left after some seconds at once."""

    def script(wire: Wire) -> None:
        until = time.monotonic() + total_s
        while wire.read(size):
            if time.monotonic() < until:
                time.sleep(pause_s)

    return script


def drip_chunks(pause_s: float, octets: bytes = b"tick\n") -> peers.Script:
    """Answer with chunks without end."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(CHUNKED)
        while wire.end is None:
            wire.send(chunk(octets))
            if select.select([wire.sock], [], [], pause_s)[0]:
                wire.read()

    return script


def upgrade_and(what: str) -> peers.Script:
    """Switch protocols, echo once, then end in some way."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.send(SWITCHED)
        wire.send(wire.read())
        if what == "reset":
            time.sleep(0.05)  # a reset overtakes data that was not read yet
            wire.reset()
        else:
            (wire.end_write if what == "fin" else wire.cut_write)()
            wire.await_end()

    return script


def end_after(count: int) -> peers.Script:
    """Read a head and some octets of its body, then end in the middle of the request."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read_exactly(count)
        wire.end_write()
        wire.await_end()

    return script


def cut_after_head(wire: Wire) -> None:
    """Read a head, and end without close_notify."""
    wire.read_head()
    wire.cut_write()
    wire.await_end()


def raw_stream(wire: Wire) -> None:
    """As dockerd's attach without Upgrade: a 200, then raw octets both ways; answers after the client's half-close."""
    wire.read_head()
    wire.send(RAW_STREAM)
    wire.send(wire.read())
    rest = wire.read_to_end()
    wire.send(b"bye" + rest)
    wire.end_write()


def after_half_close(wire: Wire) -> None:
    """Switch protocols, and answer only when the client has ended its side."""
    wire.read_head()
    wire.send(SWITCHED)
    octets = wire.read_to_end()
    wire.send(b"got %d" % len(octets))
    wire.end_write()


def stale(wire: Wire) -> None:
    """Answer one request, and close when a second one comes."""
    wire.read_request()
    wire.send(ok(b"first"))
    wire.read_head()
    wire.close()


def stale_once() -> peers.Script:
    """As ``stale`` for the first connection; the next ones answer."""
    count = 0

    def script(wire: Wire) -> None:
        nonlocal count
        count += 1
        if count == 1:
            stale(wire)
        else:
            answer(ok(b"second"))(wire)

    return script


def unused(wire: Wire) -> None:
    """Must never be reached."""
    raise AssertionError("upstream was reached")


@contextlib.contextmanager
def refused_url() -> collections.abc.Iterator[str]:
    with peers.closed_port() as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def full_url() -> collections.abc.Iterator[str]:
    with peers.full_listener() as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def fixed_url(url: str) -> collections.abc.Iterator[str]:
    yield url


@contextlib.contextmanager
def https_to(script: peers.Script) -> collections.abc.Iterator[str]:
    """A listener that speaks no TLS, or not as it should, where TLS is spoken to it."""
    with Upstream(script) as upstream:
        yield upstream.url.replace("http://127.0.0.1", "https://localhost")


def end_after_hello(wire: Wire) -> None:
    """Take what opens a TLS handshake, and end."""
    wire.read()
    wire.end_write()
    wire.await_end()


def say(octets: bytes) -> peers.Script:
    """Say something else than TLS."""

    def script(wire: Wire) -> None:
        wire.read()
        wire.send(octets)
        wire.await_end()

    return script


# -- the table --------------------------------------------------------------------------------------------------------

T = str(LIMIT_S)
abort = functools.partial(Row, event="abort")
reject = functools.partial(
    Row,
    upstream=unused,
    event="reject",
    side="client",
    phase="request_head",
    operation="read",
    reached=False,
    whole=True,
    body=(0, 0),
)

COMPLETE = [
    Row("a length", request(get()), answer(ok(BODY)), status=200, whole=True, body=(0, 1024)),
    Row("no content", request(get()), answer(ok(b"")), status=200, whole=True, body=(0, 0)),
    Row(
        "chunks and a trailer",
        request(get()),
        answer(CHUNKED + chunk(b"abc") + chunk(BODY) + b"0\r\nX-Sum: 7\r\n\r\n"),
        status=200,
        whole=True,
        body=(0, 1027),
    ),
    Row(
        "until the connection closes",
        request(get()),
        answer_and_close(UNTIL_CLOSE + BODY),
        status=200,
        body=(0, 1024),
        client_end=("fin", "close_notify"),
    ),
    Row("HEAD", request(get(method="HEAD"), "HEAD"), answer(ok(b"")[:-4].replace(b"th: 0", b"th: 99") + b"\r\n\r\n"), status=200,
        whole=True, body=(0, 0)),
    Row("204", request(get()), answer(b"HTTP/1.1 204 No Content\r\n\r\n"), status=204, whole=True, body=(0, 0)),
    Row(
        "304 with a length",
        request(get()),
        answer(b'HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\nETag: "x"\r\n\r\n'),
        status=304,
        whole=True,
        body=(0, 0),
    ),
    Row("an error of upstream's own", request(get()), answer(b"HTTP/1.1 500 Oops\r\nContent-Length: 3\r\n\r\nbad"), status=500,
        whole=True, body=(0, 3)),
    Row("a body with a length", request(post()), answer(ok()), status=200, whole=True, body=(1024, 2)),
    Row(
        "a body in chunks with a trailer",
        request(post_chunked(b"abc", BODY, end=b"0\r\nX-Sum: 7\r\n\r\n")),
        answer(ok()),
        status=200,
        whole=True,
        body=(1027, 2),
    ),
    Row("16 MiB up", request(post(HUGE)), answer(ok()), status=200, whole=True, body=(len(HUGE), 2), within_s=60),
    Row("16 MiB down", request(get()), answer(ok(HUGE)), status=200, whole=True, body=(0, len(HUGE)), within_s=60),
    Row("16 MiB down in chunks", request(get()), answer(CHUNKED + chunk(HUGE[:9_999_999]) + chunk(HUGE[9_999_999:]) + b"0\r\n\r\n"),
        status=200, whole=True, body=(0, len(HUGE)), within_s=60),
    Row("one empty line before a request", request(b"\r\n" + get()), answer(ok()), status=200, whole=True, exact=()),
    Row("three requests on one connection", several(get("/1"), post(target="/2"), get("/3")), answer(ok(), requests=3),
        status=200, records=3),
    Row("three requests pipelined", several(get("/1"), post(target="/2"), get("/3"), pipelined=True), answer(ok(), requests=3),
        status=200, records=3),
    Row("expect and 100", expect_continue(BODY), continue_late(0.0, ok()), status=200, body=(1024, 2)),
    Row("expect and a final answer", expect_continue(BODY), peers.answer_at_once(b"HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n"),
        status=417, body=(0, 0)),
    Row("an interim response", interim_then_final(get()), answer(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + ok()),
        status=200, body=(0, 2)),
    Row("HTTP/1.0, from chunks", request(get(version="1.0")), answer(CHUNKED + chunk(b"abc") + b"0\r\n\r\n"), status=200,
        body=(0, 3), client_end=("fin", "close_notify")),
    Row("HTTP/1.0, with a length", request(get(version="1.0")), answer(ok()), status=200, whole=True, body=(0, 2)),
    Row("an answer before the request is through", request(post(length=50_000_000)),
        peers.answer_at_once(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"), status=413, whole=True),
    Row("a drip slower than a limit, never silent for one", request(get()), peers.drip(ok(b"")[:-5] + b"8\r\n\r\n", b"abcdefgh", 1, 0.1),
        ("--upstream-read-timeout", "0.5", "--client-write-timeout", "0.5"), status=200, whole=True, body=(0, 8)),
    Row("a drip upwards", drip(post(b"abcdefgh"), 12, 0.06), answer(ok()), ("--client-read-timeout", "0.4",
        "--client-head-timeout", "5"), status=200, whole=True, body=(8, 2)),
    Row("the client waits for upstream, and its timeout stands still", request(post(HUGE)), read_late(0.6, ok()),
        ("--client-read-timeout", T), status=200, whole=True, body=(len(HUGE), 2), within_s=60),
    Row("upstream waits for the client, and its timeout stands still", read_slowly(get(extra="Connection: close\r\n"), 4 * 1024 * 1024,
        0.4, 0.8), answer(ok(HUGE)), ("--upstream-read-timeout", T), status=200, body=(0, len(HUGE)),
        receive_buffer=32768, within_s=60),
    Row("a slow reader is not a stuck one", read_slowly(get(extra="Connection: close\r\n"), 16384, 0.05, 3.0),
        answer(ok(HUGE)), ("--client-write-timeout", "1.5"), status=200, body=(0, len(HUGE)), receive_buffer=16384,
        within_s=60),
    Row("the client waits for 100, and its timeout stands still", expect_continue(BODY), continue_late(0.5, ok()),
        ("--client-read-timeout", T), status=200, body=(1024, 2)),
    Row("a half-close that is allowed", half_close(get()), answer(ok()), ("--client-half-close", "allow"), status=200, whole=True),
    Row("an upgrade, and an end of the client's", tunnel(get(extra=UPGRADE), b"hello"), peers.upgrade(), status=101, body=(5, 5)),
    Row("an upgrade, and an end of upstream's", tunnel(get(extra=UPGRADE), b"hello", ""), upgrade_and("fin"), status=101,
        body=(5, 5)),
    Row("a half-close in a tunnel", tunnel(get(extra=UPGRADE), b""), after_half_close, status=101, body=(0, 5)),
    Row("docker's raw stream", tunnel(post(b"", target="/v1.41/containers/x/attach?stream=1"), b"hello"), raw_stream, status=200,
        body=(5, 8)),
    Row("an upgrade that upstream declines", request(get(extra=UPGRADE)), answer(ok()), status=200, whole=True, body=(0, 2)),
    Row("a connection without a byte", only_connect, unused, event=None, records=0, reached=False),
    Row("an idle connection ends", idle_after(get()), answer(ok()), ("--keepalive-timeout", T), status=200, whole=True,
        client_end=("fin", "close_notify")),
    Row("a connection idle from its start ends", wait_idle, unused, ("--keepalive-timeout", T), event=None, records=0,
        reached=False, client_end=("fin", "close_notify")),
]  # fmt: skip

TOO_LONG = b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: test\r\n\r\n"
TOO_MANY = b"GET / HTTP/1.1\r\nHost: test\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(300)) + b"\r\n"
TOO_LARGE = (
    b"GET / HTTP/1.1\r\nHost: test\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 1000) for n in range(90)) + b"\r\n"
)

REJECTED = [
    reject("a space before the colon", request(b"GET / HTTP/1.1\r\nHost: test\r\nX-A : b\r\n\r\n"), status=400, cause="protocol",
           error_type="http_request_error"),
    reject("a length and chunks", request(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
           b"0\r\n\r\n"), status=400, cause="protocol", error_type="http_request_error"),
    reject("two lengths", request(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc"), status=400,
           cause="protocol"),
    reject("a line without CR", request(b"GET / HTTP/1.1\nHost: test\n\n"), status=400, cause="protocol"),
    reject("two empty lines before a request", request(b"\r\n\r\n" + get()), status=400, cause="protocol", over=(PLAIN,)),
    reject("two empty lines, one by one", drip(b"\r\n\r\n", 2, 0.1), status=400, cause="protocol", over=(PLAIN,)),
    reject("a folded field", request(b"GET / HTTP/1.1\r\nHost: test\r\nX-A: b\r\n c\r\n\r\n"), status=400, cause="protocol"),
    reject("no host", request(b"GET / HTTP/1.1\r\n\r\n"), status=400, cause="protocol"),
    reject("two hosts", request(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), status=400, cause="protocol"),
    reject("noise", request(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), status=400, cause="protocol"),
    reject("CONNECT", request(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"), status=405, cause="forbidden"),
    reject("a request for the next hop alone", request(get("*", "Max-Forwards: 0\r\n", "OPTIONS")), status=405, cause="forbidden"),
    reject("an unknown coding", request(b"POST / HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: zip, chunked\r\n\r\n0\r\n\r\n"),
           status=501, cause="protocol"),
    reject("an HTTP/2 preface", request(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), status=505, cause="protocol"),
    reject("another version", request(b"GET / HTTP/1.2\r\nHost: test\r\n\r\n"), status=505, cause="protocol"),
    reject("a request line too long", request(TOO_LONG), status=414, cause="limit", limit="max_head_size"),
    reject("too many fields", request(TOO_MANY), status=431, cause="limit", limit=OPEN),
    reject("a head too large", request(TOO_LARGE), status=431, cause="limit", limit="max_head_size"),
    reject("a length too large", request(post(length=5000)), options=("--max-body-size", "1000"), status=413, cause="limit",
           limit="max_body_size"),
    reject("what follows is never parsed", request(b"GET / HTTP/1.1\r\nHost : test\r\n\r\n" + get("/smuggled")), status=400,
           cause="protocol", client_end=("fin", "close_notify")),
]  # fmt: skip

# More than the kernel takes for a peer that does not read.
GIANT = (
    b"GET / HTTP/1.1\r\nHost: test\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"y" * 60_000) for n in range(240)) + b"\r\n"
)

client_head = functools.partial(
    abort, upstream=unused, side="client", phase="request_head", operation="read", reached=False, body=(0, 0)
)
client_body = functools.partial(abort, side="client", phase="request_body", operation="read")
client_gone = functools.partial(abort, side="client", phase="response_head", operation="read", within_s=2.0)
client_stuck = functools.partial(
    abort, side="client", phase="response_body", operation="write", status=200, whole=False
)

BY_CLIENT = [
    client_head("a FIN in the head", leave(get()[:-2], "fin"), cause="closed", exact=("client_read",)),
    client_head("a FIN after one byte", leave(b"G", "fin"), cause="closed", exact=("client_read",)),
    client_head("a reset in the head", leave(get()[:-2], "reset"), cause="reset", status=None, over=(PLAIN, TLS_CLIENT),
                exact=("client_read",)),
    client_head("silence in the head", stop_sending(get()[:-2]), options=("--client-head-timeout", T), cause="timeout", status=408,
                limit="client_head_timeout", whole=True, exact=("client_read",)),
    client_head("a drip in the head", drip_until_end(b"GET / HTTP/1.1\r\nX: ", b"y", 0.03), options=("--client-head-timeout", T),
                cause="timeout", status=408, limit="client_head_timeout", whole=True),
    client_head("a deadline in the head", drip_until_end(b"GET / HTTP/1.1\r\nX: ", b"y", 0.03), options=("--client-read-deadline", T),
                cause="deadline", status=408, limit="client_read_deadline", whole=True),
    client_head("a deadline in a head without a timeout", stop_sending(get()[:-2]), options=("--client-head-timeout", "none",
                "--client-read-deadline", T), cause="deadline", status=408, limit="client_read_deadline", whole=True, over=(PLAIN,)),
    client_head("a FIN without close_notify in the head", leave(get()[:-2], "cut"), cause="tls", over=(TLS_CLIENT,)),
    client_body("a FIN in the body", leave(post(b"abc", length=10), "fin", "seen"), peers.silent, cause="closed", exact=("client_read",)),
    client_body("a FIN in a chunk", leave(post_chunked(b"abc", end=b"5\r\nab"), "fin", "seen"), peers.silent, cause="closed",
                exact=("client_read",)),
    client_body("a FIN before the last chunk", leave(post_chunked(b"abc", end=b""), "fin", "seen"), peers.silent, cause="closed",
                exact=("client_read",)),
    client_body("a FIN without close_notify in the body", leave(post(b"abc", length=10), "cut", "seen"), peers.silent, over=(TLS_CLIENT,),
                cause="tls"),
    client_body("a reset in the body", leave(post(b"abc", length=10), "reset", "seen"), peers.silent, cause="reset", status=None,
                over=RESETS),
    client_body("silence in the body", stop_sending(post(b"abc", length=10)), peers.silent, ("--client-read-timeout", T),
                cause="timeout", status=408, limit="client_read_timeout", whole=True, exact=("client_read",), body=(3, 0)),
    client_body("silence in a chunk", stop_sending(post_chunked(b"abc", end=b"5\r\nab")), peers.silent, ("--client-read-timeout", T),
                cause="timeout", status=408, limit="client_read_timeout", whole=True, exact=("client_read",), body=(5, 0)),
    client_body("silence behind a 100", silent_behind_continue, continue_late(0.0, ok()), ("--client-read-timeout", T),
                cause="timeout", status=408, limit="client_read_timeout", whole=True, exact=("client_read",), body=(0, 0)),
    client_body("a deadline in the body", drip_until_end(post(b"", length=100_000), b"y", 0.03), peers.silent,
                ("--client-read-deadline", T), cause="deadline", status=408, limit="client_read_deadline", whole=True),
    client_body("a deadline while the client waits for a 100 that never comes, and no timeout", expect_continue(BODY), peers.silent,
                ("--client-read-timeout", "0.05", "--client-write-timeout", "0.05", "--upstream-write-timeout", "0.05",
                 "--upstream-head-timeout", "0.05", "--upstream-read-timeout", "0.05", "--client-read-deadline", "0.4"),
                cause="deadline", status=408, limit="client_read_deadline", whole=True, exact=("client_read",)),
    client_body("no chunk size", request(post_chunked(b"abc", end=b"zz\r\n")), peers.silent, cause="protocol", status=400, whole=True,
                error_type="http_request_error"),
    client_body("a chunk longer than its size", request(post_chunked(end=b"2\r\nabcd\r\n")), peers.silent, cause="protocol", status=400,
                whole=True),
    client_body("chunks too large", request(post_chunked(b"a" * 800, b"b" * 800)), peers.silent, ("--max-body-size", "1000"),
                cause="limit", status=413, limit="max_body_size", whole=True),
    client_gone("a FIN while the answer is awaited", leave(get(), "fin", "seen"), peers.silent, cause="closed",
                exact=("client_read", "upstream_written")),
    client_gone("a FIN right behind the request", half_close(get()), peers.silent, phase=OPEN, cause="closed", reached=None),
    client_gone("a FIN behind a posted request", leave(post(), "fin", "seen"), peers.silent, cause="closed", body=(1024, 0)),
    client_gone("a FIN without close_notify while the answer is awaited", leave(get(), "cut", "seen"), peers.silent,
                over=(TLS_CLIENT,), cause="tls"),
    client_gone("a reset while the answer is awaited", leave(get(), "reset", "seen"), peers.silent, cause="reset", status=None,
                over=RESETS, exact=("client_read",)),
    abort("a FIN in the response", leave(get(), "fin", "body"), peers.answer_and_wait(LONG + b"abcd"), side="client",
          phase="response_body", cause="closed", status=200, exact=("upstream_read",), body=(0, 4), within_s=2.0),
    abort("a FIN in an endless response", leave(get(), "fin", "body"), drip_chunks(0.05), side="client", phase="response_body",
          cause="closed", status=200, within_s=2.0),
    abort("a reset in the response", leave(get(), "reset", "body"), peers.answer_and_wait(LONG + b"abcd"), side="client",
          phase="response_body", cause="reset", status=200, over=RESETS, exact=("upstream_read",), body=(0, 4), within_s=2.0),
    abort("a reset in a flood", leave(get(), "reset", "body"), peers.flood(LONG), side="client", phase="response_body",
          cause="reset", status=200, over=RESETS, within_s=2.0),
    abort("a reset in a chunked stream", leave(get(), "reset", "body"), drip_chunks(0.05), side="client", phase="response_body",
          cause="reset", status=200, over=RESETS, within_s=2.0),
    abort("a FIN without close_notify in the response", leave(get(), "cut", "body"), peers.answer_and_wait(LONG + b"abcd"),
          side="client", phase="response_body", cause="tls", status=200, over=(TLS_CLIENT,), body=(0, 4), within_s=2.0),
    abort("a FIN while upstream is connected", leave(get(), "fin"), unused, side="client", phase="connect", operation="read",
          cause="closed", url=full_url, reached=False, over=(PLAIN, TLS_CLIENT), within_s=2.0),
    abort("a FIN without close_notify while upstream is connected", leave(get(), "cut"), unused, side="client", phase="connect",
          cause="tls", url=full_url, reached=False, over=(TLS_CLIENT,), within_s=2.0),
    abort("a reset while upstream is connected", leave(get(), "reset"), unused, side="client", phase="connect", operation="read",
          cause="reset", status=None, url=full_url, reached=False, over=(PLAIN,), within_s=2.0),
    abort("a deadline while upstream is connected", request(get()), unused, ("--client-write-deadline", T), side="client",
          phase="connect", cause="deadline", limit="client_write_deadline", status=504, whole=True, url=full_url, reached=False,
          over=(PLAIN, TLS_CLIENT)),
    client_body("a deadline in the body while upstream is connected", request(post(b"abc", length=10)), unused,
                ("--client-read-deadline", T), cause="deadline", status=408, limit="client_read_deadline", whole=True, url=full_url,
                reached=False, over=(PLAIN, TLS_CLIENT), exact=("client_read",), body=(0, 0)),
    abort("a reader that stops in interim answers", stop_reading(get()), peers.flood(b"", b"HTTP/1.1 103 \r\nX: %s\r\n\r\n" % (b"y" * 2000)),
          ("--client-write-timeout", T), side="client", phase="response_head", operation="write", cause="timeout",
          limit="client_write_timeout", status=None, receive_buffer=8192, within_s=20.0),
    client_stuck("a reader that stops", stop_reading(get()), peers.flood(LONG), ("--client-write-timeout", T), cause="timeout",
                 limit="client_write_timeout", receive_buffer=8192, within_s=10.0),
    client_stuck("a reader that stops in a chunked stream", stop_reading(get()), peers.flood(CHUNKED, chunk(bytes(65536))),
                 ("--client-write-timeout", T), cause="timeout", limit="client_write_timeout", receive_buffer=8192, within_s=10.0),
    client_stuck("a deadline for a reader that stops", stop_reading(get()), peers.flood(LONG), ("--client-write-deadline", T),
                 cause="deadline", limit="client_write_deadline", receive_buffer=8192, within_s=10.0),
    # Not exact: a drop may come while the limit runs out, and is then not read any more.
    client_stuck("a deadline in a drip", request(get()), drip_chunks(0.05), ("--client-write-deadline", T), cause="deadline",
                 limit="client_write_deadline"),
    abort("a deadline while the answer is awaited", request(get()), peers.silent, ("--client-write-deadline", T), side="client",
          phase="response_head", operation="write", cause="deadline", limit="client_write_deadline", whole=True),
    abort("a deadline of the answer to an upload under way", stop_sending(post(b"part", length=100)), peers.silent,
          ("--client-write-deadline", T), side="client", phase="response_head", operation="write", cause="deadline",
          limit="client_write_deadline", status=504, whole=True),
    abort("a FIN without close_notify in a tunnel", tunnel(get(extra=UPGRADE), b"hello", "cut"), peers.upgrade(), side="client",
          phase="tunnel", cause="tls", status=101, body=(5, 5), over=(TLS_CLIENT,)),
    abort("a reset in a tunnel", tunnel(get(extra=UPGRADE), b"hello", "reset"), peers.upgrade(), side="client", phase="tunnel",
          cause="reset", status=101, body=(5, 5), over=RESETS, exact=("client_read", "client_written")),
]  # fmt: skip

at_connect = functools.partial(
    abort, client=request(get()), upstream=unused, side="upstream", whole=True, reached=False, body=(0, 0)
)
in_handshake = functools.partial(
    at_connect, phase="tls_handshake", operation="handshake", over=(TLS_UPSTREAM,), reached=None
)
at_head = functools.partial(abort, side="upstream", phase="response_head", operation="read", status=502, whole=True)
in_body = functools.partial(abort, side="upstream", phase="response_body", operation="read", status=200, whole=False)

BY_UPSTREAM = [
    at_connect("nobody listens", phase="connect", operation="connect", cause="refused", status=502, over=(PLAIN, TLS_CLIENT),
               url=refused_url, error_type="connection_refused"),
    at_connect("nobody listens for what is no chunk", client=request(post_chunked(b"abc", end=b"zz\r\n")), phase="connect",
               operation="connect", cause="refused", status=502, over=(PLAIN, TLS_CLIENT), url=refused_url, exact=("client_read",)),
    at_connect("a unix socket is missing", phase="connect", operation="connect", cause="unreachable", status=502, over=(PLAIN,),
               error_type="destination_unavailable",
               url=functools.partial(fixed_url, "unix:///nonexistent/docker.sock")),
    at_connect("a name without an address", phase="connect", operation="connect", cause="dns", status=502, over=(PLAIN,), within_s=15.0,
               url=functools.partial(fixed_url, "http://nowhere.invalid:80"), error_type="dns_error"),
    at_connect("a connect without an answer", phase="connect", operation="connect", cause="timeout", status=504,
               options=("--upstream-connect-timeout", T), limit="upstream_connect_timeout", over=(PLAIN, TLS_CLIENT), url=full_url,
               error_type="connection_timeout"),
    # The kernel looks at its user timeout when it sends the SYN once more, after a second.
    at_connect("upstream's kernel does not answer", phase="connect", operation="connect", cause="dead_peer", status=504,
               options=("--upstream-connect-timeout", "none", "--tcp-user-timeout", T), limit="tcp_user_timeout", over=(PLAIN,),
               url=full_url, error_type="connection_timeout"),
    in_handshake("upstream silent in the handshake", cause="timeout", status=504, options=("--upstream-connect-timeout", T),
                 limit="upstream_connect_timeout", url=functools.partial(https_to, peers.deaf)),
    in_handshake("upstream speaks no TLS", cause="tls", status=502,
                 url=functools.partial(https_to, say(b"HTTP/1.1 400 Bad Request\r\n\r\n")), error_type="tls_protocol_error"),
    in_handshake("upstream closes in the handshake", cause="tls", status=502, url=functools.partial(https_to, end_after_hello)),
    in_handshake("upstream resets in the handshake", cause="reset", status=502,
                 url=functools.partial(https_to, peers.reset_after(100))),
    abort("upstream never reads", request(post(HUGE * 3)), peers.deaf, ("--upstream-write-timeout", T), side="upstream",
          phase="request_body", operation="write", cause="timeout", status=504, limit="upstream_write_timeout", whole=True,
          within_s=10.0),
    abort("upstream reads too slowly", request(post(HUGE * 3)), read_slow(8192, 0.02, 1.5), ("--upstream-write-deadline", "0.4"),
          side="upstream", phase="request_body", operation="write", cause="deadline", status=504, limit="upstream_write_deadline",
          whole=True, within_s=10.0),
    abort("upstream resets in the request", request(post(b"x" * 5000, length=10_000)), peers.reset_after(4000), side="upstream",
          phase="request_body", cause="reset", status=502, whole=True, over=RESETS),
    # With octets unread the end is a reset, which may or may not overtake it.
    abort("upstream closes in the request", request(post(b"x" * 5000, length=10_000)), peers.close_at_once, side="upstream",
          phase="request_body", status=502, whole=True),
    abort("upstream ends in the request", request(post(b"x" * 5000, length=10_000)), end_after(5000), side="upstream",
          phase="request_body", operation="read", cause="closed", status=502, whole=True, exact=("upstream_written",), body=(5000, 0)),
    abort("upstream never reads a head", request(GIANT), peers.deaf, ("--upstream-write-timeout", T, "--max-head-size", "16MiB"),
          side="upstream", phase="response_head", operation="write", cause="timeout", status=504, limit="upstream_write_timeout",
          error_type="connection_write_timeout", whole=True, over=(PLAIN, TLS_UPSTREAM), within_s=10.0),
    abort("upstream reads a head too slowly", request(GIANT), read_slow(8192, 0.02, 1.0), ("--upstream-write-deadline", T,
          "--max-head-size", "16MiB"), side="upstream", phase="response_head", operation="write", cause="deadline", status=504,
          limit="upstream_write_deadline", error_type="connection_write_timeout", whole=True, over=(PLAIN, TLS_UPSTREAM), within_s=10.0),
    abort("upstream cuts TLS in the request", request(post(b"x" * 5000, length=10_000)), cut_after_head, side="upstream",
          phase="request_body", cause="tls", status=502, whole=True, over=(TLS_UPSTREAM,)),
    at_head("upstream cuts TLS without an answer", request(get()), cut_after_head, cause="tls", over=(TLS_UPSTREAM,)),
    at_head("upstream closes without an answer", request(post()), answer_and_close(b""), cause="closed", exact=("client_read",
            "upstream_written")),
    at_head("upstream resets without an answer", request(post()), peers.answer_and_reset(b""), cause="reset", over=RESETS),
    at_head("upstream closes in its head", request(post()), answer_and_close(b"HTTP/1.1 200 OK\r\nContent-"), cause="closed",
            exact=("upstream_read",)),
    at_head("upstream resets in its head", request(post()), peers.answer_and_reset(b"HTTP/1.1 200 OK\r\nContent-"), cause="reset",
            over=RESETS),
    at_head("a head without a version", request(get()), answer_and_close(b"200 OK\r\n\r\n"), cause="protocol",
            error_type="http_protocol_error"),
    at_head("a space before the colon in an answer", request(get()), answer_and_close(b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n"),
            cause="protocol"),
    at_head("an answer with two lengths", request(get()),
            answer_and_close(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"), cause="protocol",
            exact=("upstream_read",)),
    at_head("an answer of another version", request(get()), answer_and_close(b"HTTP/2.0 200 OK\r\n\r\n"), cause="protocol"),
    at_head("a switch of protocols that nobody asked for", request(get()), answer_and_close(SWITCHED), cause="protocol", over=(PLAIN,)),
    at_head("a switch to a protocol that was not offered", request(get(extra=UPGRADE)), answer_and_close(SWITCHED.replace(b"tcp", b"h2c")),
            cause="protocol", over=(PLAIN,)),
    at_head("a switch to no protocol", request(get(extra=UPGRADE)), answer_and_close(b"HTTP/1.1 101 S\r\n\r\n"), cause="protocol",
            over=(PLAIN,)),
    at_head("an answer's head too large", request(get()),
            answer_and_close(b"HTTP/1.1 200 OK\r\n" + b"X: %s\r\n" % (b"y" * 1000) * 90 + b"\r\n"), cause="limit", limit="max_head_size"),
    at_head("no answer", request(get()), peers.silent, ("--upstream-head-timeout", T), cause="timeout", status=504,
            limit="upstream_head_timeout", error_type="http_response_timeout", exact=("client_read", "upstream_written")),
    at_head("half a head and silence", request(get()), send_then_stall(b"HTTP/1.1 200 OK\r\n"), ("--upstream-head-timeout", T),
            cause="timeout", status=504, limit="upstream_head_timeout", exact=("upstream_read",)),
    in_body("upstream closes in a length", request(get()), answer_and_close(LONG + BODY), cause="closed", exact=("upstream_read",),
            body=(0, 1024)),
    in_body("upstream closes in a chunk", request(get()), answer_and_close(CHUNKED + b"fff\r\nabc"), cause="closed",
            exact=("upstream_read",), body=(0, 3)),
    in_body("upstream closes before the last chunk", request(get()), answer_and_close(CHUNKED + chunk(BODY)), cause="closed",
            exact=("upstream_read",), body=(0, 1024)),
    in_body("upstream cuts TLS in a length", request(get()), peers.answer_and_cut(LONG + BODY), cause="tls", over=(TLS_UPSTREAM,),
            body=(0, 1024)),
    in_body("upstream cuts TLS where the end is the end", request(get()), peers.answer_and_cut(UNTIL_CLOSE + BODY), cause="tls",
            over=(TLS_UPSTREAM,), client_end=("reset",)),
    in_body("upstream resets in a length", request(get()), peers.answer_and_reset(LONG + BODY), cause="reset", over=RESETS,
            exact=("upstream_read",), body=(0, 1024)),
    in_body("upstream resets in a chunk", request(get()), peers.answer_and_reset(CHUNKED + b"fff\r\nabc"), cause="reset", over=RESETS,
            exact=("upstream_read",), body=(0, 3)),
    in_body("upstream resets where the end is the end", request(get()), peers.answer_and_reset(UNTIL_CLOSE + BODY), cause="reset",
            over=RESETS, client_end=("reset",)),
    in_body("no chunk size in an answer", request(get()), in_two(CHUNKED + chunk(b"abc"), b"xyz\r\n"), cause="protocol",
            body=(0, 3)),
    in_body("a trailer section too large in an answer", request(get()),
            in_two(CHUNKED + chunk(b"abc"), b"0\r\n" + b"X: %s\r\n" % (b"y" * 1000) * 90 + b"\r\n"), cause="limit", limit="max_head_size",
            body=(0, 3)),
    in_body("upstream falls silent in a length", request(get()), send_then_stall(LONG + BODY), ("--upstream-read-timeout", T),
            cause="timeout", limit="upstream_read_timeout", exact=("upstream_read",), body=(0, 1024)),
    in_body("upstream falls silent in chunks", request(get()), send_then_stall(CHUNKED + chunk(BODY)), ("--upstream-read-timeout", T),
            cause="timeout", limit="upstream_read_timeout", exact=("upstream_read",), body=(0, 1024)),
    in_body("upstream falls silent where the end is the end", request(get()), send_then_stall(UNTIL_CLOSE + BODY),
            ("--upstream-read-timeout", T), cause="timeout", limit="upstream_read_timeout", client_end=("reset",),
            over=(PLAIN, TLS_CLIENT, TLS_UPSTREAM)),
    in_body("upstream takes too long", request(get()), drip_chunks(0.05), ("--upstream-read-deadline", T), cause="deadline",
            limit="upstream_read_deadline"),
    abort("upstream resets in a tunnel", tunnel(get(extra=UPGRADE), b"hello", ""), upgrade_and("reset"), side="upstream",
          phase="tunnel", cause="reset", status=101, body=(5, 5), over=RESETS),
    abort("upstream cuts TLS in a tunnel", tunnel(get(extra=UPGRADE), b"hello", ""), upgrade_and("cut"), side="upstream",
          phase="tunnel", cause="tls", status=101, body=(5, 5), over=(TLS_UPSTREAM,)),
    abort("a silent tunnel", tunnel(get(extra=UPGRADE), b"hello", ""), peers.upgrade(), ("--tunnel-timeout", T), side="proxy",
          phase="tunnel", cause="timeout", status=101, limit="tunnel_timeout", body=(5, 5),
          exact=("client_read", "client_written", "upstream_read", "upstream_written")),
]  # fmt: skip

ROWS = [*COMPLETE, *REJECTED, *BY_CLIENT, *BY_UPSTREAM]

_CLOSED = "{client} closed the connection"
_AWAITED = "the request was sent and no response had reached {client}, {upstream} had answered"
_UNACKNOWLEDGED = re.compile(r" \([0-9,]+ bytes unacknowledged\)")  # depends on when the peer's kernel sends its ACK
_AFTER = re.compile(r" after [0-9]+\.[0-9] s")
# What the message of a row says; compared over plain TCP.
SENTENCES = {
    "a FIN in the head": f"{_CLOSED} in the middle of the request head and ended GET / after T:"
    " 28 bytes of the request head had come from {client}",
    "a FIN after one byte": f"{_CLOSED} in the middle of the request head and ended a request after T:"
    " 1 bytes of the request head had come from {client}",
    "silence in the head": "client_head_timeout (0.2 s, set by flag) ended GET / after T:"
    " 28 bytes of the request head had come from {client}",
    "a FIN in the body": f"{_CLOSED} in the middle of the request body and ended POST / after T"
    " (the request body was not whole): 3 of 10 bytes of the request body had gone to {upstream} from {client}",
    "a reset in the body": "{client} reset the connection in the middle of the request body and ended POST / after T:"
    " 3 of 10 bytes of the request body had gone to {upstream} from {client}",
    "silence in a chunk": "client_read_timeout (0.2 s, set by flag) ended POST / after T:"
    " 5 bytes of the request body had gone to {upstream} from {client}",
    "a FIN while the answer is awaited": f"{_CLOSED} while the response was awaited and ended GET / after T:"
    f" {_AWAITED} 0 bytes",
    "a FIN in the response": f"{_CLOSED} in the middle of the response and ended GET / after T:"
    " 4 of 1,000,000,000 bytes of the response had gone to {client}, {upstream} was still sending",
    "a reset in a tunnel": "{client} reset the connection in the middle of the tunnel and ended GET / after T:"
    " 5 bytes had passed from {client} to {upstream}, 5 bytes back",
    "a silent tunnel": "tunnel_timeout (0.2 s, set by flag) ended GET / after T:"
    " 5 bytes had passed from {client} to {upstream}, 5 bytes back",
    "nobody listens": "upstream {url} could not be reached (refused: Connection refused), which ended GET / after T:"
    " nothing of it had reached upstream from {client}",
    "a connect without an answer": "upstream_connect_timeout (0.2 s, set by flag) ended GET / after T:"
    " nothing of it had reached upstream from {client}",
    "upstream ends in the request": "{upstream} closed the connection in the middle of the request body and ended POST /"
    " after T: 5,000 of 10,000 bytes of the request body had gone to {upstream} from {client}",
    "upstream closes without an answer": "{upstream} closed the connection while the response was awaited and ended POST /"
    f" after T: {_AWAITED} 0 bytes",
    "upstream closes in its head": "{upstream} closed the connection while the response was awaited and ended POST /"
    f" after T (its response head was not whole): {_AWAITED} 25 bytes",
    "an answer's head too large": "max_head_size (65,536, by default) ended GET / after T (the response head is too large):"
    f" {_AWAITED} {{read}} bytes",
    "an answer of another version": "{upstream} sent a response that is not valid HTTP/1.1:"
    f" an HTTP version other than 1.0 and 1.1 (octet 0 near b'HTTP/2.0 200 OK'): {_AWAITED} 19 bytes",
    "no chunk size": "{client} sent a request that is not valid HTTP/1.1: not a chunk size (octet 8 near b'zz\\r\\n'):"
    " 0 bytes of the request body had gone to {upstream} from {client}",
    "no answer": f"upstream_head_timeout (0.2 s, set by flag) ended GET / after T: {_AWAITED} 0 bytes",
    "upstream closes in a length": "{upstream} closed the connection in the middle of the response and ended GET / after T:"
    " 1,024 of 1,000,000,000 bytes of the response had gone to {client}",
    "upstream resets in a chunk": "{upstream} reset the connection in the middle of the response and ended GET / after T:"
    " 3 bytes of the response had gone to {client}",
    "upstream falls silent in chunks": "upstream_read_timeout (0.2 s, set by flag) ended GET / after T:"
    " 1,024 bytes of the response had gone to {client}",
}  # fmt: skip


def _cases() -> list[tuple[Row, tuple[str, str]]]:
    """Returns: each row over each transport, those with the same options side by side: they share a proxy."""
    return sorted(((row, over) for row in ROWS for over in row.over), key=lambda case: (case[1], case[0].options))


def test_names_of_rows_are_unique() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert SENTENCES.keys() <= set(names)


@pytest.mark.parametrize(("row", "over"), _cases(), ids=[f"{row.name} [{over[0]}-{over[1]}]" for row, over in _cases()])
def test_scenario(stage: Stage, row: Row, over: tuple[str, str]) -> None:
    _play(stage, row, over)


# One row or two of each kind, for what all rows have in common: that there are more workers, or another form.
REPRESENTATIVE = (
    "chunks and a trailer",
    "three requests pipelined",
    "a half-close in a tunnel",
    "a length and chunks",
    "a FIN while the answer is awaited",
    "no answer",
    "upstream resets in a chunk",
)


@pytest.mark.parametrize("over", [PLAIN, TLS_CLIENT], ids="-".join)
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_scenario_with_two_workers(stage: Stage, name: str, over: tuple[str, str]) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    _play(stage, dataclasses.replace(row, options=(*row.options, "--workers", "2")), over)


@pytest.mark.parametrize("other_form", harness.FORMS[1:])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_scenario_in_another_form(
    stage: Stage, name: str, other_form: str, single_file: pathlib.Path, archive: pathlib.Path
) -> None:
    (row,) = (row for row in ROWS if row.name == name)
    _play(stage, row, PLAIN, other_form)


def _play(stage: Stage, row: Row, over: tuple[str, str], form: str = "package") -> None:
    towards_client, towards_upstream = over
    upstream = stage.upstream = stage.upstreams[towards_upstream]
    upstream.script = row.upstream
    with contextlib.ExitStack() as stack:
        url = upstream.url if row.url is None else stack.enter_context(row.url())
        proxy = stage.use(url, towards_client, row.options, form)
        try:
            _run(stage, proxy, row, over)
            upstream.forget()
        except BaseException:
            stage.discard()
            with contextlib.suppress(Exception):  # of a row that has failed already
                upstream.forget()
            raise


def _run(stage: Stage, proxy: harness.ProxyProcess, row: Row, over: tuple[str, str]) -> None:
    before = len(proxy.requests())
    context = stage.client_context if over[0] == "tls" else None
    buffer = row.receive_buffer if over[0] != "unix" else None
    began_at = time.monotonic()
    with peers.connect(proxy.address, context, receive_buffer=buffer) as wire:
        own = wire.sock.getsockname()
        seen = row.client(wire, stage)
    records = proxy.wait_requests(before + row.records)[before:]
    took_s = time.monotonic() - began_at
    assert took_s < row.within_s, f"it took {took_s:.2f} s"
    if row.url is None and (row.reached or any(record["bytes"]["upstream_written"] for record in records)):
        stage.upstream.wire()  # the kernel took what was sent before the connection was accepted
    stage.upstream.settle()
    for record in records:
        harness.check_record(record)
        if over[0] != "unix":
            assert record["client"] == f"{own[0]}:{own[1]}"
    for record in records[:-1]:
        assert record["event"] == "request.complete", record
    assert len({record["request_id"] for record in records}) == len(records)
    assert len({record["connection_id"] for record in records}) <= 1
    if row.client_end:
        assert wire.end in row.client_end
    if row.event is not None:
        _check_fields(row, records[-1])
        if over == PLAIN and row.name in SENTENCES:
            _check_sentence(stage, row, records[-1])
        if row.records == 1:
            _check_counts(stage, row, records[-1], wire)
        _check_seen(row, records[-1], seen)
    wires = stage.upstream.wires
    if row.reached is not None and row.url is None:
        assert bool(wires) is row.reached
    if row.reached and row.event is not None:
        assert records[-1]["upstream"] == stage.upstream.name
    elif row.reached is False and records:
        assert records[-1]["upstream"] is None


def _check_fields(row: Row, record: harness.LogRecord) -> None:
    expected = {
        "event": f"request.{row.event}",
        "status": row.status,
        "side": row.side,
        "phase": row.phase,
        "operation": row.operation,
        "cause": row.cause,
        "error_type": row.error_type,
    }
    expected = {name: value for name, value in expected.items() if value is not OPEN}
    assert {name: record.get(name) for name in expected} == expected
    if row.limit is None:
        assert record.get("limit") is None
    elif row.limit is not OPEN:
        limit = record["limit"]
        flag = "--" + row.limit.replace("_", "-")
        assert limit["name"] == row.limit
        assert limit["source"] == ("flag" if flag in row.options else "default")
        if "seconds" in limit:
            assert limit["seconds"] == float(row.options[row.options.index(flag) + 1])
            assert limit["seconds"] <= limit["elapsed_s"] < limit["seconds"] + LATE_S
    if row.body is not None:
        assert (record["bytes"]["request_body"], record["bytes"]["response_body"]) == row.body


def _check_sentence(stage: Stage, row: Row, record: harness.LogRecord) -> None:
    said = _AFTER.sub(" after T", _UNACKNOWLEDGED.sub("", record["message"]))
    url = stage.proxy.start_record["settings"]["upstream"]["value"]
    read = f"{record['bytes']['upstream_read']:,}"
    upstream, client = f"upstream {stage.upstream.name}", f"client {record['client']}"
    assert said == SENTENCES[row.name].format(client=client, upstream=upstream, url=url, read=read)


def _check_counts(stage: Stage, row: Row, record: harness.LogRecord, wire: Wire) -> None:
    counts = record["bytes"]
    orderly = ("fin", "close_notify", None)
    wires = stage.upstream.wires if row.url is None else []
    saw = {"client_read": wire.sent.count, "client_written": wire.received.count}
    exact = set(row.exact)
    if wires:
        saw |= {"upstream_read": wires[-1].sent.count, "upstream_written": wires[-1].received.count}
        if wires[-1].end in ("fin", "close_notify") and row.upstream is not peers.deaf:
            exact.add("upstream_written")
    elif row.url is None:
        assert (counts["upstream_read"], counts["upstream_written"]) == (0, 0)
    if wire.end in ("fin", "close_notify"):
        exact.add("client_written")
    if row.event == "complete" and wire.end in orderly:
        exact |= {"client_written", "upstream_read"}
        if record["status"] != 413:
            exact |= {"client_read", "upstream_written"}
    if "one empty line" in row.name:
        saw["client_read"] -= 2  # begins nothing, and so belongs to no request
    if row.name == "an answer's head too large":
        assert counts["upstream_read"] > 65536
    for name, count in saw.items():
        if name in exact:
            assert counts[name] == count, f"{name} is {counts[name]}, and {count} passed"
        elif name.endswith("_read"):
            assert counts[name] <= count, f"{name} is {counts[name]}, and only {count} were sent"
        else:
            assert counts[name] >= count, f"{name} is {counts[name]}, and {count} were received"


def _check_seen(row: Row, record: harness.LogRecord, seen: Seen) -> None:
    responses = seen if isinstance(seen, list) else [seen] if seen is not None else []
    if row.whole is not None and not (row.whole is False and not responses):
        assert responses, "the client saw no response"
        assert responses[-1].whole is row.whole
    if not responses:
        return
    last = responses[-1]
    if record["status"] is not None:
        assert last.status == record["status"]
    assert last.get_all("x-request-id") == [record["request_id"].encode()]
    if row.event != "complete" and last.whole and last.status >= 400:
        assert last.get("content-type") == b"application/json"
        assert last.get("connection") == b"close"
        message = json.loads(last.body)["message"]
        assert message == f"{record['message']} (request id {record['request_id']})"
        proxy_status = last.get("proxy-status")
        assert proxy_status is not None
        if record["error_type"]:
            assert record["error_type"].encode() in proxy_status
        if row.limit is not None and row.limit is not OPEN:
            assert row.limit in message


# -- what does not fit a row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["", "http://test"], ids=["origin_form", "absolute_form"])
@pytest.mark.parametrize("over", ALL, ids="-".join)
def test_dockers_stream_ends_with_a_line_that_tells_why(stage: Stage, over: tuple[str, str], origin: str) -> None:
    upstream = stage.upstream = stage.upstreams[over[1]]
    upstream.script = send_then_stall(JSON_STREAM + chunk(b'{"stream":"Step 1"}\r\n'))
    proxy = stage.use(upstream.url, over[0], ("--upstream-read-timeout", T))
    before = len(proxy.requests())
    context = stage.client_context if over[0] == "tls" else None
    with peers.connect(proxy.address, context) as wire:
        wire.send(post(b"", target=f"{origin}/v1.41/build?t=x"))
        response = wire.read_response()
        end = wire.await_end()
    record = proxy.wait_requests(before + 1)[-1]
    upstream.forget()
    assert not response.whole
    assert end == "fin"  # under TLS without close_notify: not an orderly end
    lines = [json.loads(line) for line in response.body.splitlines()]
    assert lines[0] == {"stream": "Step 1"}
    assert len(lines) == 2
    assert lines[1]["errorDetail"]["message"] == lines[1]["error"]
    assert "upstream_read_timeout" in lines[1]["error"]
    assert record["bytes"]["response_body"] == len(b'{"stream":"Step 1"}\r\n')
    assert record["bytes"]["client_written"] == wire.received.count


@pytest.mark.parametrize(
    ("target", "head", "body"),
    [
        ("/v1.41/build", JSON_STREAM, b'{"stream":"Ste'),  # within a line
        ("/v1.41/containers/x/logs", JSON_STREAM, b'{"a":1}\n'),  # another route
        ("/v1.41/build", JSON_STREAM.replace(b"json", b"x-tar"), b'{"a":1}\n'),
        ("/v1.41/build", JSON_STREAM.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n"), b'{"a":1}\n'),
        ("/v1.41/build", JSON_STREAM.replace(b"200 OK", b"400 No"), b'{"a":1}\n'),
    ],
)
def test_no_other_message_gets_a_last_line(stage: Stage, target: str, head: bytes, body: bytes) -> None:
    upstream = stage.upstream = stage.upstreams["tcp"]
    upstream.script = send_then_stall(head + chunk(body))
    proxy = stage.use(upstream.url, "plain", ("--upstream-read-timeout", T))
    with peers.connect(proxy.address) as wire:
        wire.send(post(b"", target=target))
        response = wire.read_response()
    upstream.forget()
    assert not response.whole
    assert response.body == body


def test_a_stale_connection_is_replaced_and_the_record_says_so(stage: Stage) -> None:
    upstream = stage.upstream = stage.upstreams["tcp"]
    upstream.script = stale_once()
    proxy = stage.use(upstream.url, "plain", ())
    before = len(proxy.requests())
    with peers.connect(proxy.address) as wire:
        wire.get("/1")
        assert wire.read_response().body == b"first"
        wire.get("/2")
        assert wire.read_response().body == b"second"
    record = proxy.wait_requests(before + 2)[-1]
    harness.check_record(record)
    assert len(record["attempts"]) == 1
    assert record["bytes"]["upstream_written"] == upstream.wires[-1].received.count
    # The response may be on record before the thread that sent it has counted it.
    harness.wait_until(lambda: upstream.wires[-1].sent.count > 0, 5, "the count of what upstream sent")
    assert record["bytes"]["upstream_read"] == upstream.wires[-1].sent.count
    upstream.forget()


def test_a_request_that_is_not_idempotent_is_never_repeated(stage: Stage) -> None:
    upstream = stage.upstream = stage.upstreams["tcp"]
    upstream.script = stale_once()
    proxy = stage.use(upstream.url, "plain", ())
    before = len(proxy.requests())
    with peers.connect(proxy.address) as wire:
        wire.get("/1")
        assert wire.read_response().body == b"first"
        wire.send(post(b"pay", target="/2"))
        assert wire.read_response().status == 502
    record = proxy.wait_requests(before + 2)[-1]
    harness.check_record(record)
    assert (record["event"], record["side"]) == ("request.abort", "upstream")
    assert record["cause"] in ("closed", "reset")
    assert len(upstream.wires) == 1
    upstream.forget()


def test_a_body_that_was_read_bit_by_bit_is_never_sent_again(stage: Stage) -> None:
    """However idempotent the request is: what came behind its head is gone."""
    asked = threading.Event()

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(ok(b"first"))
        wire.read_head()
        wire.read_exactly(3)
        asked.set()
        wire.read_exactly(3)
        wire.close()

    upstream = stage.upstreams["tcp"]
    upstream.script = script
    proxy = stage.use(upstream.url, "plain", ())
    before = len(proxy.requests())
    with peers.connect(proxy.address) as wire:
        wire.get("/1")
        assert wire.read_response().body == b"first"
        wire.send(b"PUT /2 HTTP/1.1\r\nHost: test\r\nContent-Length: 6\r\n\r\nabc")
        assert asked.wait(10)
        wire.send(b"def")
        assert wire.read_response().status == 502
    record = proxy.wait_requests(before + 2)[-1]
    harness.check_record(record)
    assert (record["event"], record["side"], record["phase"]) == ("request.abort", "upstream", "response_head")
    assert record["bytes"]["request_body"] == 6
    assert "attempts" not in record
    if record["duration_s"] < 1.0:  # later it was not as idle that upstream has ended it
        assert "; not sent again, as its body can't be read again)" in record["message"]
    upstream.settle()
    assert len(upstream.wires) == 1
    upstream.forget()


@pytest.mark.parametrize(
    ("phase", "sent", "upstream_does"),
    [
        ("connect", get(), None),
        ("request_body", post(b"abc", length=10), peers.silent),
        ("response_head", get(), peers.silent),
        ("tunnel", get(extra=UPGRADE), peers.upgrade()),
    ],
)
def test_shutdown_ends_what_is_left_in_any_phase(phase: str, sent: bytes, upstream_does: peers.Script | None) -> None:
    with contextlib.ExitStack() as stack:
        if upstream_does is None:
            url = stack.enter_context(full_url())
        else:
            upstream = stack.enter_context(Upstream(upstream_does))
            url = upstream.url
        proxy = stack.enter_context(harness.ProxyProcess(url, "--drain-timeout", "0.1"))
        wire = stack.enter_context(peers.connect(proxy.address))
        wire.send(sent)
        if phase == "tunnel":
            wire.read_head()
        elif upstream_does is not None:
            upstream.await_head()
        else:
            proxy.wait_in_flight()
        proxy.send_signal(signal.SIGTERM)
        wire.await_end()
        proxy.await_stop()
        (record,) = proxy.requests()
    harness.check_record(record)
    assert (record["event"], record["side"], record["phase"]) == ("request.abort", "proxy", phase)
    assert (record["cause"], record["operation"]) == ("shutdown", None)


@pytest.mark.parametrize("over", [PLAIN, TLS_CLIENT], ids="-".join)
def test_sigterm_in_mid_response_ends_it_after_the_drain_time(
    certificates: Certificates, over: tuple[str, str]
) -> None:
    tls = certificates.server
    options = ["--tls-cert", tls, "--tls-key", tls] if over[0] == "tls" else []
    with (
        Upstream(drip_chunks(0.02)) as upstream,
        harness.ProxyProcess(upstream.url, "--drain-timeout", "0.3", *options) as proxy,
        peers.connect(proxy.address, certificates.client_context() if options else None) as wire,
    ):
        wire.get()
        wire.read_head()
        began_at = time.monotonic()
        proxy.send_signal(signal.SIGTERM)
        assert wire.await_end() == "fin"
        assert 0.29 < time.monotonic() - began_at < 0.3 + LATE_S
        proxy.await_stop()
        record = proxy.requests()[-1]
    harness.check_record(record)
    assert (record["event"], record["side"], record["phase"], record["cause"]) == (
        "request.abort",
        "proxy",
        "response_body",
        "shutdown",
    )
    assert record["bytes"]["client_written"] == wire.received.count


def test_sigterm_lets_a_short_request_finish(stage: Stage) -> None:
    with (
        Upstream(peers.drip(ok(b"")[:-5] + b"8\r\n\r\n", b"abcdefgh", 1, 0.05)) as upstream,
        harness.ProxyProcess(upstream.url, "--drain-timeout", "10") as proxy,
        peers.connect(proxy.address) as wire,
    ):
        wire.get()
        wire.read_head()
        assert wire.read_exactly(1) == b"a"
        proxy.send_signal(signal.SIGTERM)
        assert wire.read_exactly(7) == b"bcdefgh"
        assert wire.await_end() == "fin"
        stop = proxy.await_stop()
        assert stop["requests"] == {"begun": 1, "complete": 1, "reject": 0, "abort": 0}


@pytest.mark.parametrize("what", ["stranger_ca", "wrong_name", "expired"])
def test_a_certificate_of_upstream_that_does_not_hold(certificates: Certificates, what: str) -> None:
    certificate = {"stranger_ca": certificates.stranger}.get(what) or getattr(certificates, what)
    context = certificates.server_context(certificate=certificate)
    with (
        Upstream(unused, "tls", tls=context) as upstream,
        harness.ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        peers.connect(proxy.address) as wire,
    ):
        wire.get()
        response = wire.read_response()
        record = proxy.next_request()
    harness.check_record(record)
    assert response.status == 502
    expected = ("request.abort", "upstream", "tls_handshake", "handshake", "tls", "tls_certificate_error")
    names = ("event", "side", "phase", "operation", "cause", "error_type")
    assert tuple(record[name] for name in names) == expected
    assert record["exception"] is not None


@pytest.mark.parametrize("shown", ["none", "stranger"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("body", [0, 4_000_000])
def test_an_upstream_that_does_not_accept_our_certificate(
    certificates: Certificates, shown: str, version: ssl.TLSVersion, body: int
) -> None:
    """In TLS 1.3 it says so when the handshake is over for us, and parts of the request may be out."""
    context = certificates.server_context(client_ca=certificates.ca)
    context.maximum_version = version
    options = ["--upstream-ca", certificates.ca]
    if shown == "stranger":
        options += ["--upstream-cert", certificates.stranger]
    with (
        Upstream(unused, "tls", tls=context) as upstream,
        harness.ProxyProcess(upstream.url, *options) as proxy,
        peers.connect(proxy.address) as wire,
    ):
        wire.send(b"PUT / HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % body)
        if body:
            wire.send_until_answered(bytes(body))
        response = wire.read_response()
        record = proxy.next_request()
    harness.check_record(record)
    assert response.status == 502
    expected = ("request.abort", "upstream", "tls_handshake", "handshake", "tls", "tls_alert_received")
    names = ("event", "side", "phase", "operation", "cause", "error_type")
    assert tuple(record[name] for name in names) == expected
    assert "ALERT" in record["exception"]["text"]


@pytest.mark.parametrize("what", ["plain", "closed", "silent", "reset", "untrusting"])
def test_a_handshake_that_fails_is_a_connection_and_no_request(certificates: Certificates, what: str) -> None:
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server, "--client-head-timeout", T)
    with Upstream(unused) as upstream, harness.ProxyProcess(upstream.url, *tls) as proxy:
        if what == "untrusting":
            with pytest.raises(ssl.SSLError):
                peers.connect(proxy.address, certificates.client_context(ca=certificates.stranger_ca))
        else:
            with peers.connect(proxy.address) as wire:
                if what == "plain":
                    wire.get()
                else:
                    wire.send(b"\x16\x03\x01\x02\x00\x01")
                if what == "closed":
                    wire.end_write()
                if what == "reset":
                    time.sleep(0.05)
                    wire.reset()
                else:
                    wire.await_end()
        record = proxy.wait_for(lambda record: record["event"] == "connection.abort")
        stop = proxy.stop()
        assert sum(record["event"] == "connection.abort" for record in proxy.records()) == 1
    assert (record["level"], record["side"], record["phase"], record["operation"]) == (
        "warning",
        "client",
        "tls_handshake",
        "handshake",
    )
    cause, exception = {
        "plain": ("protocol", None),
        "closed": ("closed", "SSLEOFError"),
        "silent": ("timeout", None),
        "reset": ("reset", "ConnectionResetError"),
        "untrusting": ("tls", "SSLError"),
    }[what]
    assert record["cause"] == cause
    assert (record["exception"] or {}).get("class") == exception
    said = {
        "plain": "plain text on a TLS port, beginning with b'GET / HT'",
        "silent": "client_head_timeout (0.2 s, set by flag)",
    }
    why = said.get(what) or record["exception"]["text"]
    assert record["message"].startswith(f"TLS handshake with client {record['client']} failed after ")
    assert record["message"].endswith(f" s ({cause}): {why}")
    assert stop["requests"]["begun"] == 0


def test_a_health_check_of_a_tls_port_is_no_failure(certificates: Certificates) -> None:
    """Many of them reset the connection once it stands; nothing had begun. One that comes to be accepted is seen."""
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server, "--log-level", "debug")
    with Upstream(unused) as upstream, harness.ProxyProcess(upstream.url, *tls) as proxy:
        peers.connect(proxy.address).reset()
        wire = peers.connect(proxy.address)
        proxy.wait_connections(1)
        wire.reset()
        record = proxy.wait_for(lambda record: record["event"] == "connection.close")
        assert (record["level"], record["requests"], record["why"]) == ("debug", 0, "reset")
        assert not [record for record in proxy.records() if record["event"] == "connection.abort"]


def test_plain_http_on_a_tls_port_is_told_in_plain_http(certificates: Certificates) -> None:
    """As any answer of the proxy's own, but for a request id: no request has begun."""
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server, "--proxy-name", "here")
    with Upstream(unused) as upstream, harness.ProxyProcess(upstream.url, *tls) as proxy:
        with peers.connect(proxy.address) as wire:
            wire.get()
            response = wire.read_response()
            assert wire.await_end() == "fin"
    assert (response.status, response.get("Content-Type")) == (400, b"application/json")
    message = json.loads(response.body)["message"]
    assert "this port speaks TLS" in message
    assert response.get("Proxy-Status") == b'here; details="' + message.encode() + b'"'
    assert response.get("X-Request-Id") is None


def test_plain_http_on_a_tls_port_is_said_though_the_client_has_left(certificates: Certificates) -> None:
    tls = ("--tls-cert", certificates.server, "--tls-key", certificates.server)
    with Upstream(unused) as upstream, harness.ProxyProcess(upstream.url, *tls) as proxy:
        for _ in range(20):
            with peers.connect(proxy.address) as wire:
                wire.get()
                wire.reset()
        harness.wait_until(lambda: len(proxy.records()) >= 21)
        ended = [record for record in proxy.records() if record["event"] == "connection.abort"]
        assert {(record["cause"], record["operation"]) for record in ended} == {("protocol", "handshake")}


def test_a_refusal_says_what_was_too_much_or_is_not_served() -> None:
    too_long = b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: t\r\n\r\n"
    sentences = {
        b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n": "CONNECT a:443 of {client} was refused"
        " (this is a reverse proxy and opens no tunnels); nothing of it went upstream",
        get(
            "*", "Max-Forwards: 0\r\n", "OPTIONS"
        ): "OPTIONS * of {client} was refused (Max-Forwards is 0, so it ends here,"
        " and the proxy has no resources of its own); nothing of it went upstream",
        post(b"", length=5000): "max_body_size (1,000, set by flag) ended POST / after {time} s"
        " (the announced body has 5,000 bytes); nothing of it went upstream",
        post_chunked(bytes(600), bytes(600)): "max_body_size (1,000, set by flag) ended POST / after {time} s"
        " (the body is larger than 1,000 bytes): 0 bytes of the request body had gone to {upstream} from {client}",
        too_long: f"max_head_size (1,024, set by flag) ended GET /{'a' * 295}... after {{time}} s"
        " (the request line is larger); nothing of it went upstream",
        get(extra="X: %s\r\n" % ("y" * 2000)): "max_head_size (1,024, set by flag) ended GET / after {time} s"
        " (the request head is larger); nothing of it went upstream",
    }
    bounds = ("--max-body-size", "1000", "--max-head-size", "1024")
    with Upstream(peers.silent) as upstream, harness.ProxyProcess(upstream.url, *bounds) as proxy:
        for octets, sentence in sentences.items():
            with peers.connect(proxy.address) as wire:
                wire.send(octets)
                response = wire.read_response()
            told = json.loads(response.body)["message"]
            assert (response.get("Allow") is not None) is (response.status == 405)  # RFC 9110 §15.5.6
            record = proxy.next_request()
            time_s = record["message"].partition(" after ")[2].partition(" s")[0]
            who = {"client": f"client {record['client']}", "upstream": f"upstream {upstream.name}", "time": time_s}
            assert record["message"] == sentence.format(**who)
            assert told == f"{record['message']} (request id {record['request_id']})"


def test_the_two_sides_are_the_sockets_that_were_used(stage: Stage) -> None:
    """Two requests at once, of which one is aborted: each record has its own client, upstream and counts."""
    upstream = stage.upstream = stage.upstreams["tcp"]
    upstream.script = peers.answer_and_wait(LONG + b"abcd")
    proxy = stage.use(upstream.url, "plain", ())
    before = len(proxy.requests())
    wires = [peers.connect(proxy.address) for _ in range(3)]
    for wire in wires:
        wire.get()
        wire.read_head()
        wire.read_exactly(4)
    names = ["{}:{}".format(*wire.sock.getsockname()) for wire in wires]
    wires[1].reset()
    record = proxy.wait_requests(before + 1)[-1]
    assert record["client"] == names[1]
    for wire in wires:
        wire.close()
    proxy.wait_requests(before + 3)
    upstream.forget()


def test_a_socket_file_without_a_listener_refuses(tmp_path: typing.Any) -> None:
    path = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(path)
    with harness.ProxyProcess(f"unix://{path}") as proxy, peers.connect(proxy.address) as wire:
        wire.get()
        assert wire.read_response().status == 502
        record = proxy.next_request()
    harness.check_record(record)
    assert (record["side"], record["phase"], record["cause"]) == ("upstream", "connect", "refused")
