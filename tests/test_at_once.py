"""Exchanges that need no relay: the same octets and the same record as with one, whatever upstream answers, and a relay
that goes on where they can't.

Which way an exchange took is written down by a witness in the proxy's process, put there as faults/sitecustomize.py is.
A limit below 0.1 s makes every exchange take a relay, which is how both ways are compared.
"""

import collections
import collections.abc
import contextlib
import dataclasses
import gc
import itertools
import os
import pathlib
import random
import re
import select
import ssl
import subprocess
import threading
import time
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import harness
import peers
from conftest import Certificates
from harness import TERMINAL, LogRecord, ProxyProcess, check_record, wait_until
from in_process import serving
from peers import Upstream, Wire, chunk, connect, ok
from proxy.exchange import ClientConnection
from proxy.framing import ChunkedFraming
from proxy.grammar import MalformedMessage
from proxy.log import EventLog
from proxy.relay import Relay

# -- the witness ------------------------------------------------------------------------------------------------------

AT_ONCE = "at once"
IN_VAIN = "in vain"  # tried, and a relay goes on
RELAY = "relay"
ANY = "any of them"  # no relay would be needed, and one does no harm

_WITNESS = """
import os
from proxy.exchange import ClientConnection

_fd = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_at_once, _relay = ClientConnection._exchange_at_once, ClientConnection._relay


def note(subject, what):
    os.write(_fd, b"%b %b\\n" % (subject, what.encode()))


def at_once(self, record, *rest):
    look_at_writes(self.client)
    done = _at_once(self, record, *rest)
    note(record.head.target, "at once" if done else "in vain")
    return done


def relay(self, record, *rest):
    note(record.head.target, "relay")
    return _relay(self, record, *rest)


def look_at_writes(client):
    real = client.write
    if hasattr(real, "looks"):
        return

    def write(octets, flags):
        try:
            count = real(octets, flags)
        except OSError as error:
            note(b"-", f"client write {type(error).__name__}")
            raise
        if count != len(octets):
            note(b"-", "client write in part")
        return count

    write.looks = True
    client.write = write


ClientConnection._exchange_at_once = at_once
ClientConnection._relay = relay
"""


class Witness:
    """What the witness in a proxy's process has seen. ``env`` puts it there."""

    def __init__(self, directory: pathlib.Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "sitecustomize.py").write_text(_WITNESS)
        self.path = directory / "seen"
        self.path.touch()
        self.env = {"PYTHONPATH": f"{directory}:{harness.ROOT}", "WITNESS": str(self.path)}
        self._from = 0

    def _lines(self) -> list[tuple[str, str]]:
        pairs = [line.split(" ", 1) for line in self.path.read_text().splitlines()]
        return [(subject, what) for subject, what in pairs]

    def forget(self) -> None:
        """Look only at what comes from now on."""
        self._from = len(self._lines())

    def seen(self, subject: str) -> list[str]:
        """Returns: what was seen since then of a target, or, for ``-``, of writes that clients did not take whole."""
        return [what for about, what in self._lines()[self._from :] if about == subject]


# -- the same exchange twice ------------------------------------------------------------------------------------------

HEAD_CAME = "head came"  # to upstream
CONTINUE = "100"  # has come to the client
FIN = "fin"
RESET = "reset"
Steps = tuple[bytes | float | str, ...]
MAX_HEAD = 8192

GET = b"GET /case HTTP/1.1\r\nHost: t\r\n\r\n"
AFTER = b"GET /after HTTP/1.1\r\nHost: t\r\n\r\n"
FINE = ok(b"fine")


def _get(fields: bytes = b"", version: bytes = b"1.1", method: bytes = b"GET") -> bytes:
    return b"%b /case HTTP/%b\r\nHost: t\r\n%b\r\n" % (method, version, fields)


def _post(body: bytes, fields: bytes = b"", method: bytes = b"POST") -> bytes:
    return b"%b /case HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n%b\r\n%b" % (method, len(body), fields, body)


def _sized(total: int) -> bytes:
    """Returns: an answer of so many octets in all."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %06d\r\n\r\n"
    size = total - len(head % 0)
    return head % size + random.Random(total).randbytes(size)


_IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk_sized(total: int) -> bytes:
    """Returns: an answer of so many octets in all, in one chunk."""
    around = len(_IN_CHUNKS) + len(b"ffff\r\n\r\n0\r\n\r\n")
    return _IN_CHUNKS + chunk(random.Random(total).randbytes(total - around)) + b"0\r\n\r\n"


def _dripped(octets: bytes) -> collections.abc.Iterator[bytes | float]:
    """Give the octets one by one, with pauses."""
    for octet in octets:
        yield bytes((octet,))
        yield 0.0005


def _head_of(total: int, end: bytes = b"\r\n\r\n") -> bytes:
    """Returns: the head of an answer without content, of so many octets."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Pad: "
    return head + b"p" * (total - len(head) - len(end)) + end


@dataclasses.dataclass(frozen=True)
class Case:
    """What the client sends, what upstream answers to each request for ``/case``, and which way the exchanges take
    where nothing keeps them from it.
    """

    ways: tuple[str, ...]
    answer: Steps = (FINE,)
    ask: Steps = (GET,)
    event: str = "request.complete"
    kept: bool = True  # whether the client's connection takes another request after it


_LATE_S = 0.2  # ten times as long as an answer is waited for at once: a busy machine finds none that early


def _answered(way: str, *answer: bytes | float | str, ask: bytes = GET, abort: bool = False, kept: bool = True) -> Case:
    event = "request.abort" if abort else "request.complete"
    return Case((way,), answer, (ask,), event, kept and not abort)


_BAD = {
    "no status line": b"nonsense\r\n\r\n",
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
    "version 2": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "length no number": b"HTTP/1.1 200 OK\r\nContent-Length: 4x\r\n\r\nfine",
    "length negative": b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\nfine",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nfine",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nfine",
    "bare line feed": b"HTTP/1.1 200 OK\nContent-Length: 4\r\n\r\nfine",
    "control octet": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: a\x00b\r\n\r\nfine",
    "space before colon": b"HTTP/1.1 200 OK\r\nContent-Length : 4\r\n\r\nfine",
    "folded line": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: a\r\n b\r\n\r\nfine",
    "101 nobody asked for": b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: 0\r\n\r\n",
}

CASES: dict[str, Case] = {
    # Answers.
    "whole": _answered(AT_ONCE, FINE),
    "no content": _answered(AT_ONCE, ok(b"")),
    "404": _answered(AT_ONCE, b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno"),
    "205": _answered(AT_ONCE, b"HTTP/1.1 205 Reset\r\nContent-Length: 0\r\n\r\n"),
    "500": _answered(AT_ONCE, b"HTTP/1.1 500 \r\nContent-Length: 3\r\n\r\nbad"),
    "reason with odd octets": _answered(AT_ONCE, b"HTTP/1.1 299 \xe9 \t!\r\nContent-Length: 0\r\n\r\n"),
    "fields of one hop": _answered(
        AT_ONCE,
        ok(b"fine", b"Connection: keep-alive, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nX-Request-Id: u\r\n"),
    ),
    "length twice the same": _answered(IN_VAIN, ok(b"fine", b"Content-Length: 4\r\n"), abort=True),
    "http/1.0 kept": _answered(AT_ONCE, b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 4\r\n\r\nfine"),
    "60 KiB": _answered(AT_ONCE, ok(random.Random(1).randbytes(60 * 1024))),
    "one octet less than a read": _answered(AT_ONCE, _sized(65535)),
    "as much as a read": _answered(IN_VAIN, _sized(65536)),
    "one octet more than a read": _answered(IN_VAIN, _sized(65537)),
    "200 KiB": _answered(IN_VAIN, ok(random.Random(2).randbytes(200 * 1024))),
    "late": _answered(IN_VAIN, _LATE_S, FINE),
    "cut in the head": _answered(IN_VAIN, FINE[:20], 0.005, FINE[20:]),
    "cut before the last line feed": _answered(IN_VAIN, FINE[:-5], 0.005, FINE[-5:]),
    "cut behind the head": _answered(IN_VAIN, FINE[:-4], 0.005, FINE[-4:]),
    "cut in the body": _answered(IN_VAIN, FINE[:-2], 0.005, FINE[-2:]),
    "cut in the body, late": _answered(IN_VAIN, FINE[:-2], _LATE_S, FINE[-2:]),
    "octet by octet": _answered(IN_VAIN, *_dripped(FINE)),
    "204": _answered(ANY, b"HTTP/1.1 204 None\r\nX: y\r\n\r\n"),
    "204 with a length": _answered(ANY, b"HTTP/1.1 204 None\r\nContent-Length: 0\r\n\r\n"),
    "304 with a length": _answered(ANY, b"HTTP/1.1 304 Same\r\nContent-Length: 100\r\n\r\n"),
    "304 with length 0": _answered(ANY, b"HTTP/1.1 304 Same\r\nContent-Length: 0\r\n\r\n"),
    "204, then more": _answered(IN_VAIN, b"HTTP/1.1 204 None\r\nContent-Length: 4\r\n\r\nfine"),
    "204 and close": _answered(IN_VAIN, b"HTTP/1.1 204 None\r\nConnection: close\r\n\r\n", FIN),
    "304 without a length": _answered(ANY, b"HTTP/1.1 304 Same\r\nETag: x\r\n\r\n"),
    "304 in chunks": _answered(ANY, b"HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "426": _answered(IN_VAIN, b"HTTP/1.1 426 Up\r\nUpgrade: x/2\r\nConnection: Upgrade\r\nContent-Length: 2\r\n\r\nup"),
    "100 before it": _answered(IN_VAIN, b"HTTP/1.1 100 Continue\r\n\r\n" + FINE),
    "103 before it": _answered(IN_VAIN, b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + FINE),
    "103 with a length": _answered(IN_VAIN, b"HTTP/1.1 103 Hints\r\nContent-Length: 0\r\n\r\n", 0.005, FINE),
    "103 long before it": _answered(IN_VAIN, b"HTTP/1.1 103 Hints\r\n\r\n", _LATE_S, FINE),
    "chunked": _answered(AT_ONCE, _IN_CHUNKS + chunk(b"fine") + b"0\r\nX: y\r\n\r\n"),
    "chunked, no content": _answered(AT_ONCE, _IN_CHUNKS + b"0\r\n\r\n"),
    "chunked, many": _answered(AT_ONCE, _IN_CHUNKS + chunk(b"fine") * 1000 + chunk(b"x" * 30_000) + b"00\r\n\r\n"),
    "chunked, extended": _answered(AT_ONCE, _IN_CHUNKS + b"4;a=b;c\r\nfine\r\n0;last\r\n\r\n"),
    "chunked, one octet less than a read": _answered(AT_ONCE, _chunk_sized(65535)),
    "chunked, as much as a read": _answered(IN_VAIN, _chunk_sized(65536)),
    "chunked, late": _answered(IN_VAIN, _LATE_S, _IN_CHUNKS + chunk(b"fine") + b"0\r\n\r\n"),
    "chunked, 205": _answered(AT_ONCE, _IN_CHUNKS.replace(b"200", b"205") + b"0\r\n\r\n"),
    "chunked, cut behind the head": _answered(IN_VAIN, _IN_CHUNKS, 0.005, chunk(b"fine") + b"0\r\n\r\n"),
    "chunked, cut in a size": _answered(IN_VAIN, _IN_CHUNKS + b"1", 0.005, b"0\r\nsixteen octets!!\r\n0\r\n\r\n"),
    "chunked, cut in a chunk": _answered(IN_VAIN, _IN_CHUNKS + b"4\r\nfi", 0.005, b"ne\r\n0\r\n\r\n"),
    "chunked, cut before the last chunk": _answered(IN_VAIN, _IN_CHUNKS + chunk(b"fine"), 0.005, b"0\r\n\r\n"),
    "chunked, cut in the trailers": _answered(IN_VAIN, _IN_CHUNKS + b"0\r\nX: ", 0.005, b"y\r\n\r\n"),
    "chunked, cut before the last line feed": _answered(IN_VAIN, _IN_CHUNKS + b"0\r\n\r", 0.005, b"\n"),
    "chunked, ends in a chunk": _answered(IN_VAIN, _IN_CHUNKS + b"4\r\nfi", FIN, abort=True),
    "chunked, ends before the last chunk": _answered(IN_VAIN, _IN_CHUNKS + chunk(b"fine"), FIN, abort=True),
    "chunked, excess": _answered(IN_VAIN, _IN_CHUNKS + b"0\r\n\r\nmore"),
    "chunked, then the end": _answered(AT_ONCE, _IN_CHUNKS + b"0\r\n\r\n", FIN),
    "chunked, close": _answered(
        IN_VAIN, _IN_CHUNKS[:-2] + b"Connection: close\r\n\r\n" + chunk(b"fine") + b"0\r\n\r\n", FIN
    ),
    "chunked, no size": _answered(IN_VAIN, _IN_CHUNKS + b"fine\r\n0\r\n\r\n", abort=True),
    "chunked, longer than its size": _answered(
        IN_VAIN, _IN_CHUNKS + chunk(b"fine") + b"2\r\nfine\r\n0\r\n\r\n", abort=True
    ),
    "chunked, bare line feed": _answered(IN_VAIN, _IN_CHUNKS + b"4\nfine\r\n0\r\n\r\n", abort=True),
    "chunked, framing in the trailers": _answered(
        IN_VAIN, _IN_CHUNKS + chunk(b"fine") + b"0\r\nContent-Length: 4\r\n\r\n", abort=True
    ),
    "chunked, trailers too large": _answered(
        IN_VAIN, _IN_CHUNKS + b"0\r\nX: %b\r\n\r\n" % (b"y" * MAX_HEAD), abort=True
    ),
    "chunked, asks to close": _answered(
        AT_ONCE, _IN_CHUNKS + chunk(b"fine") + b"0\r\n\r\n", ask=_get(b"Connection: close\r\n"), kept=False
    ),
    "chunked, from 1.0": _answered(
        RELAY, _IN_CHUNKS + chunk(b"fine") + b"0\r\n\r\n", ask=_get(version=b"1.0"), kept=False
    ),
    "chunked twice": _answered(
        IN_VAIN, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n", abort=True
    ),
    "to the end": _answered(IN_VAIN, b"HTTP/1.1 200 OK\r\n\r\nfine", FIN, kept=False),
    "excess": _answered(IN_VAIN, FINE + b"more"),
    "excess like another answer": _answered(IN_VAIN, FINE + ok(b"evil")),
    "close": _answered(IN_VAIN, ok(b"fine", b"Connection: close\r\n"), FIN),
    "http/1.0": _answered(IN_VAIN, b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfine", FIN),
    "whole, then the end": _answered(AT_ONCE, FINE, FIN),
    "largest head": _answered(AT_ONCE, _head_of(MAX_HEAD)),
    "head too large": _answered(IN_VAIN, _head_of(MAX_HEAD + 1), abort=True),
    "head too large without end": _answered(IN_VAIN, _head_of(MAX_HEAD + 500, b""), abort=True),
    "ends in the head": _answered(IN_VAIN, FINE[:25], FIN, abort=True),
    "ends in the body": _answered(IN_VAIN, ok(b"fine")[:-1], FIN, abort=True),
    "ends behind the head": _answered(IN_VAIN, ok(b"fine")[:-4], FIN, abort=True),
    "reset before it": _answered(IN_VAIN, RESET, abort=True),
    "end before it": _answered(IN_VAIN, FIN, abort=True),
    "reset before it, to a POST": _answered(IN_VAIN, RESET, ask=_post(b"hello"), abort=True),
    "end before it, to a POST": _answered(IN_VAIN, FIN, ask=_post(b"hello"), abort=True),
    **{f"malformed: {name}": _answered(IN_VAIN, octets, abort=True) for name, octets in _BAD.items()},
    # Requests.
    "HEAD": _answered(ANY, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", ask=_get(method=b"HEAD")),
    "HEAD, late": _answered(ANY, _LATE_S, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", ask=_get(method=b"HEAD")),
    "HEAD, cut": _answered(ANY, b"HTTP/1.1 200 OK\r\nContent-", 0.005, b"Length: 9\r\n\r\n", ask=_get(method=b"HEAD")),
    "HEAD, no length": _answered(ANY, b"HTTP/1.1 200 OK\r\n\r\n", ask=_get(method=b"HEAD")),
    "HEAD, chunks": _answered(ANY, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ask=_get(method=b"HEAD")),
    "HEAD, then content": _answered(ANY, FINE, ask=_get(method=b"HEAD")),
    "HEAD, 103 before it": _answered(ANY, b"HTTP/1.1 103 Hints\r\n\r\n" + FINE[:-4], ask=_get(method=b"HEAD")),
    "HEAD, close": _answered(ANY, ok(b"", b"Connection: close\r\n"), FIN, ask=_get(method=b"HEAD")),
    "HEAD, 404, asks to close": _answered(
        ANY,
        b"HTTP/1.1 404 No\r\nContent-Length: 5\r\n\r\n",
        ask=_get(b"Connection: close\r\n", method=b"HEAD"),
        kept=False,
    ),
    "with an id": _answered(AT_ONCE, FINE, ask=_get(b"X-Request-Id: mine\r\n")),
    "DELETE": _answered(AT_ONCE, FINE, ask=_get(method=b"DELETE")),
    "OPTIONS": _answered(AT_ONCE, FINE, ask=_get(b"Max-Forwards: 5\r\n", method=b"OPTIONS")),
    "upgrade refused": _answered(AT_ONCE, FINE, ask=_get(b"Connection: Upgrade, TE\r\nUpgrade: x\r\nTE: trailers\r\n")),
    "empty line first": _answered(AT_ONCE, FINE, ask=b"\r\n" + GET),
    "long target": _answered(AT_ONCE, FINE, ask=GET.replace(b"/case", b"/case?" + b"q" * 5000)),
    "secret": _answered(AT_ONCE, FINE, ask=GET.replace(b"/case", b"/case?token=hunter2")),
    "POST": _answered(AT_ONCE, FINE, ask=_post(b"hello")),
    "POST of length 0": _answered(AT_ONCE, FINE, ask=_post(b"")),
    "POST without a length": _answered(AT_ONCE, FINE, ask=_get(method=b"POST")),
    "POST of 40 KiB": _answered(ANY, FINE, ask=_post(b"h" * 40_000)),  # it may be read in parts
    "PUT, answered late": _answered(IN_VAIN, _LATE_S, FINE, ask=_post(b"hello", method=b"PUT")),
    "POST, body later": Case((RELAY,), ask=(_post(b"hello")[:-5], HEAD_CAME, b"hello")),
    "POST, rest later": Case((RELAY,), ask=(_post(b"hello")[:-2], HEAD_CAME, b"lo")),
    "POST in chunks": _answered(RELAY, FINE, ask=_get(b"Transfer-Encoding: chunked\r\n") + chunk(b"hi") + b"0\r\n\r\n"),
    "Expect": Case((RELAY,), ask=(_post(b"hello", b"Expect: 100-continue\r\n")[:-5], CONTINUE, b"hello")),
    "Expect, with its body": _answered(RELAY, FINE, ask=_post(b"hello", b"Expect: 100-continue\r\n")),
    "from 1.0": _answered(RELAY, FINE, ask=_get(version=b"1.0"), kept=False),
    "from 1.0, kept": _answered(RELAY, FINE, ask=_get(b"Connection: keep-alive\r\n", b"1.0")),
    "asks to close": _answered(AT_ONCE, FINE, ask=_get(b"Connection: close\r\n"), kept=False),
    "asks to close, 404 late": _answered(IN_VAIN, _LATE_S, FINE, ask=_get(b"Connection: close\r\n"), kept=False),
    "two at a time": Case((RELAY, AT_ONCE), ask=(GET * 2,)),
    "three at a time": Case((RELAY, RELAY, AT_ONCE), ask=(_post(b"a") + GET + _post(b"b"),)),
    "one and a half": Case((RELAY, AT_ONCE), ask=(GET + GET[:9], HEAD_CAME, GET[9:])),
    "two at a time, HEAD last": Case(
        (RELAY, ANY), (b"HTTP/1.1 304 Same\r\nContent-Length: 4\r\n\r\n",), (GET + _get(method=b"HEAD"),)
    ),
}


@dataclasses.dataclass
class Seen:
    """What peers and log had of one exchange, but for what differs from run to run."""

    client: bytes
    client_end: str | None
    upstream: list[bytes]  # each connection
    upstream_ends: list[str | None]
    records: list[object]
    ways: list[str]


def _normal(octets: bytes) -> bytes:
    """Returns: the octets without ids, ports and times."""
    octets = re.sub(rb"(X-Request-Id: |request id )[0-9a-f]{20}\b", rb"\1*", octets)
    octets = re.sub(rb"\r\nDate: [^\r]+", rb"\r\nDate: *", octets)
    return re.sub(rb"127\.0\.0\.1:\d+|\b\d+\.\d+ s\b", b"*", octets)


def _normal_record(record: LogRecord) -> object:
    different = ("time", "duration_s", "connection_id", "pid", "client", "upstream", "socket")
    rest = {name: value for name, value in record.items() if name not in different}
    rest["request_id"] = re.sub(r"^[0-9a-f]{20}$", "*", record["request_id"])
    rest["timing_s"] = sorted(record["timing_s"])
    rest["stalled_s"] = sorted(record.get("stalled_s", ()))
    rest["message"] = _normal(record["message"].encode()).decode()
    rest["sockets"] = {side: found is not None for side, found in record.get("socket", {}).items()}
    rest["events"] = [(event["side"], event["what"]) for event in record.get("events", ())]
    rest["attempts"] = [attempt | {"upstream": "*"} for attempt in record.get("attempts", ())]
    return rest


class Bench:
    """One proxy, its upstream and its witness, for one exchange after another."""

    def __init__(self, directory: pathlib.Path, *options: str, tls: ssl.SSLContext | None = None) -> None:
        self.witness = Witness(directory)
        self.tls = tls  # of clients
        self.upstream = Upstream(self._serve)
        self.case = Case(())
        self.head_came = threading.Event()
        self.ended = threading.Event()  # upstream has said that nothing more comes
        self._log_at = 0
        try:
            self.proxy = ProxyProcess(
                self.upstream.url, "--max-head-size", str(MAX_HEAD), *options, env=self.witness.env
            )
        except BaseException:
            self.upstream.close()
            raise

    def _serve(self, wire: Wire) -> None:
        """What upstream does: by the case for ``/case``, else a short answer."""
        while True:
            head = wire.read_head()
            target = head.split(b" ", 2)[1]
            if not target.startswith(b"/case"):
                close = target == b"/close"
                wire.send(ok(b"fine", b"Connection: close\r\n" if close else b""))
                if close:
                    return
                continue
            self.head_came.set()
            if b"100-continue" in head:
                wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            wire._ahead[:0] = head  # put back: with it goes the body
            wire.read_request()
            if not self._answer(wire):
                return

    def _answer(self, wire: Wire) -> bool:
        """Returns: whether the connection goes on."""
        for step in self.case.answer:
            if isinstance(step, bytes):
                wire.send(step)
            elif isinstance(step, float):
                time.sleep(step)  # late is what it shall be
            elif step == RESET:
                wire.reset()
                return False
            else:
                wire.end_write()
                self.ended.set()
                wire.await_end()
                return False
        return True

    def _new_records(self) -> list[LogRecord]:
        octets = self.proxy.log_path.read_bytes()[self._log_at :]
        records = harness.parse_log(octets[: octets.rfind(b"\n") + 1])
        return [record for record in records if record["event"] in TERMINAL and record["target"] != "/close"]

    def _exchange(self, wire: Wire, steps: Steps, count: int) -> None:
        """Send ``steps``, and read until ``count`` records are there."""
        for step in steps:
            if isinstance(step, bytes):
                wire.send(step)
            elif step == HEAD_CAME:
                assert self.head_came.wait(5)
            else:
                assert wire.read_head().split()[1] == b"100"
        until = time.monotonic() + 5
        while len(self._new_records()) < count:
            assert time.monotonic() < until, self._new_records()
            if wire.end is None and select.select([wire.sock], [], [], 0.002)[0]:
                wire.read()

    def run(self, case: Case) -> Seen:
        """Run one case, as the second request on its client and upstream connections. Returns: what was to be seen."""
        try:
            return self._run(case)
        finally:
            self._end_kept()
            self.upstream.forget()

    def _end_kept(self) -> None:
        """Let upstream end the connections that the proxy has kept."""
        while self.upstream._running:
            with connect(self.proxy.address, self.tls) as wire:
                wire.get("/close")
                wire.read_response()

    def _run(self, case: Case) -> Seen:
        self._log_at = self.proxy.log_path.stat().st_size
        self.case = case
        self.witness.forget()
        self.head_came.clear()
        self.ended.clear()
        requests = 1 + len(case.ways)
        with connect(self.proxy.address, self.tls) as wire:
            wire.get("/warm")
            assert wire.read_response().status == 200
            self._exchange(wire, case.ask, requests)
            if FIN in case.answer:
                assert self.ended.wait(5)  # else the next request may meet the end on its way, or not
            if case.kept:
                wire.send(AFTER)
                requests += 1
                self._exchange(wire, (), requests)
                wire.end_write()
            wire.await_end()
            client, end = wire.received, wire.end
            sent = wire.sent.count
        records = self._new_records()
        assert len(records) == requests
        for record in records:
            check_record(record)
        wires = list(self.upstream.wires)
        written = [bytes(each.received) for each in wires]
        # What was seen, in numbers.
        totals = collections.Counter[str]()
        for record in records:
            totals.update(record["bytes"])
        skipped = 2 * sum(step.startswith(b"\r\n") for step in case.ask if isinstance(step, bytes))
        assert totals["client_read"] == sent - skipped
        assert totals["client_written"] == client.count
        if not any("attempts" in record for record in records):
            assert totals["upstream_written"] == sum(map(len, written))
        self._end_kept()
        ends = [each.end for each in wires]
        ways = [way for target, way in self.witness._lines()[self.witness._from :] if target.startswith("/case")]
        return Seen(
            client=_normal(bytes(client)),
            client_end=end,
            upstream=[_normal(octets) for octets in written],
            upstream_ends=ends,
            records=[_normal_record(record) for record in records],
            ways=ways,
        )

    def close(self) -> None:
        """Stop both."""
        try:
            with self.proxy:
                pass
        finally:
            self.upstream.close()


@contextlib.contextmanager
def _benches(
    factory: pytest.TempPathFactory, *options: str, tls: ssl.SSLContext | None = None
) -> collections.abc.Iterator[tuple[Bench, Bench]]:
    """Give a proxy as it is, and one that always takes a relay."""
    with contextlib.ExitStack() as stack:
        made = []
        for more in ((), ("--upstream-write-timeout", "0.09")):
            bench = Bench(factory.mktemp("witness"), *options, *more, tls=tls)
            stack.callback(bench.close)
            made.append(bench)
        yield made[0], made[1]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[tuple[Bench, Bench]]:
    """For plain clients."""
    with _benches(tmp_path_factory) as both:
        yield both


@pytest.fixture(scope="module")
def tls_benches(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates
) -> collections.abc.Iterator[tuple[Bench, Bench]]:
    """For clients under TLS."""
    context = certificates.client_context()
    with _benches(tmp_path_factory, "--tls-cert", certificates.server, tls=context) as both:
        yield both


def _told(ways: list[str]) -> list[str]:
    """Returns: each exchange's way. The relay that follows what was in vain belongs to it."""
    return [way for before, way in itertools.pairwise(["", *ways]) if (before, way) != (IN_VAIN, RELAY)]


@pytest.mark.parametrize("name", CASES)
def test_it_makes_no_difference_to_anybody(name: str, benches: tuple[Bench, Bench]) -> None:
    _compare(CASES[name], *benches)


# What is written at once under TLS has a bound of its own, which "one octet less than a read" is beyond with the
# proxy's fields.
_UNDER_TLS = {name: CASES[name] for name in (
    "whole", "60 KiB", "200 KiB", "late", "cut in the body", "chunked",
    "chunked, many", "chunked, cut in a chunk", "chunked, longer than its size", "to the end", "excess",
    "reset before it", "malformed: two lengths", "POST", "POST, body later", "two at a time", "asks to close",
)} | {"one octet less than a read": _answered(IN_VAIN, _sized(65535))}  # fmt: skip


@pytest.mark.parametrize("name", _UNDER_TLS)
def test_it_makes_no_difference_under_tls(name: str, tls_benches: tuple[Bench, Bench]) -> None:
    _compare(_UNDER_TLS[name], *tls_benches)


# Whether a kernel acknowledges what it resets afterwards is a matter of chance.
_UNACKNOWLEDGED = b" bytes unacknowledged)"


def _compare(case: Case, tried: Bench, relayed: Bench) -> None:
    """Run a case on both."""
    expected = relayed.run(case)
    assert set(expected.ways) == {RELAY}
    assert [typing.cast(LogRecord, record)["event"] for record in expected.records[1 : 1 + len(case.ways)]] == [
        case.event
    ] * len(case.ways)
    # On a busy machine what comes at once elsewhere may come late, and a relay has gone on; and what comes in pieces
    # elsewhere may come together. There is no other excuse.
    excuses = {AT_ONCE: IN_VAIN}
    if any(isinstance(step, float) for step in case.answer):
        excuses[IN_VAIN] = AT_ONCE
    ways: list[str] = []
    for _ in range(10):
        seen = tried.run(case)
        if (_UNACKNOWLEDGED in seen.client) != (_UNACKNOWLEDGED in expected.client):
            expected = relayed.run(case)
            continue
        ways = _told(seen.ways)
        expected.ways = seen.ways
        assert seen == expected
        wanted = [ANY if way == ANY else went for way, went in zip(case.ways, ways, strict=True)]
        if wanted == list(case.ways):
            return
        assert all(went in (way, excuses.get(way)) for way, went in zip(case.ways, wanted, strict=True)), ways
    pytest.fail(f"went {ways} and not {case.ways}, ten times")


# -- which way an exchange takes --------------------------------------------------------------------------------------

_LIMITS = (
    "client-write-timeout", "client-write-deadline", "upstream-write-timeout", "upstream-write-deadline",
    "upstream-head-timeout", "upstream-read-timeout", "upstream-read-deadline",
)  # fmt: skip


@contextlib.contextmanager
def _served_here(log: EventLog, *options: str) -> collections.abc.Iterator[tuple[Wire, Upstream]]:
    """Give a client whose connection is served in this process, and its upstream."""
    with (
        Upstream(peers.answer_all(FINE)) as upstream,
        serving(log, "--upstream", upstream.url, *options) as server,
        server.client() as wire,
    ):
        yield wire, upstream


@pytest.mark.parametrize("limit", _LIMITS)
def test_no_limit_can_run_out_where_nobody_looks_at_limits(
    limit: str, log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those below 0.1 s each alone is enough for a relay, and of the others none."""
    ways: list[str] = []
    at_once, relay = ClientConnection._exchange_at_once, ClientConnection._relay

    def try_at_once(self: ClientConnection, *arguments: typing.Any) -> object:
        ways.append(AT_ONCE)
        return at_once(self, *arguments)

    def call_relay(self: ClientConnection, *arguments: typing.Any) -> None:
        ways.append(RELAY)
        relay(self, *arguments)

    monkeypatch.setattr(ClientConnection, "_exchange_at_once", try_at_once)
    monkeypatch.setattr(ClientConnection, "_relay", call_relay)
    for value in ("0.09", "0.1", "5"):
        ways.clear()
        with _served_here(log, f"--{limit}", value) as (wire, _):
            for _ in range(3):
                wire.get()
                assert wire.read_response().body == b"fine"
        assert (AT_ONCE in ways) is (value != "0.09")
        assert ways[0] == RELAY  # on a connection of its own


# -- what one exchange leaves to the next ------------------------------------------------------------------------------


def _large_and_small(wire: Wire) -> None:
    while True:
        target = wire.read_request().split()[1]
        wire.send(ok(b"l" * 2_000_000) if target == b"/large" else FINE)


def test_a_connection_that_was_spliced_is_as_quick_as_before(tmp_path: pathlib.Path) -> None:
    witness = Witness(tmp_path)
    afterwards = [f"/{number}" for number in range(4, 14)]
    with Upstream(_large_and_small) as upstream, ProxyProcess(upstream.url, env=witness.env) as proxy:
        with connect(proxy.address) as wire:
            for target in ("/1", "/2", "/large", "/3", "/large", *afterwards):
                wire.get(target)
                assert wire.read_response().status == 200
        assert len(upstream.wires) == 1
    for target in ("/2", "/3", *afterwards):
        assert witness.seen(target) in ([AT_ONCE], [IN_VAIN, RELAY]), target
    # On a busy machine some answers come late.
    assert any(witness.seen(target) == [AT_ONCE] for target in afterwards)


def test_an_idle_connection_holds_no_relay(log: EventLog) -> None:
    with _served_here(log) as (wire, _):
        for _ in range(2):
            wire.send(b"PUT /x HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n")
            wire.send(chunk(b"x" * 100_000) + b"0\r\n\r\n")
            assert wire.read_response().body == b"fine"
        wait_until(lambda: not [each for each in gc.get_objects() if isinstance(each, Relay)])


# -- a client that does not read --------------------------------------------------------------------------------------


class Numbered:
    """Answers each request with a body that tells which one it was, and how long; with a length, or in small chunks."""

    def __init__(self, size: int, *, chunked: bool = False) -> None:
        self.size = size
        self.chunked = chunked

    def body(self, number: int) -> bytes:
        """Returns: the content of an answer."""
        return (b"%07d\n" % number) * (self.size // 8)

    def answer(self, number: int) -> bytes:
        """Returns: an answer, head and body."""
        if not self.chunked:
            return ok(self.body(number))
        return _IN_CHUNKS + chunk(b"%07d\n" % number) * (self.size // 8) + b"0\r\n\r\n"

    def content_in(self, count: int) -> int:
        """Returns: how many of the first ``count`` octets of the body of an answer are content."""
        if not self.chunked:
            return max(0, count)
        each = len(chunk(b"%07d\n" % 0))
        whole, rest = divmod(max(0, count), each)
        return min(self.size // 8 * 8, whole * 8 + min(8, max(0, rest - len(b"8\r\n"))))

    def script(self, wire: Wire) -> None:
        """What upstream does."""
        while True:
            head = wire.read_head()
            wire.send(self.answer(int(head.split()[1][1:])))


@contextlib.contextmanager
def _stalled(
    size: int, directory: pathlib.Path, kind: str, certificates: Certificates | None
) -> collections.abc.Iterator[tuple[ProxyProcess, Wire, Upstream, Numbered, Witness, int]]:
    """Give a client that has sent one request after another, each when the one before was on record, and read no
    answer; and how many it has sent. The last one's answer is in part in the proxy.
    """
    numbered, witness = Numbered(size, chunked=kind == "chunks"), Witness(directory / "witness")
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(Upstream(numbered.script))
        options = ("--tls-cert", certificates.server) if certificates is not None else ()
        listen = "unix" if kind == "unix" else "127.0.0.1:0"
        proxy = stack.enter_context(ProxyProcess(upstream.url, *options, listen=listen, env=witness.env))
        context = certificates.client_context() if certificates is not None else None
        wire = stack.enter_context(connect(proxy.address, context, receive_buffer=4096))
        lines = 0
        at = proxy.log_path.stat().st_size
        for number in range(20_000):
            noted_before = witness.path.stat().st_size
            wire.get(f"/{number:07d}")
            until = time.monotonic() + 5
            stuck_from: float | None = None
            while True:
                with proxy.log_path.open("rb") as log:
                    log.seek(at)
                    octets = log.read()
                if octets.endswith(b"\n"):
                    at += len(octets)
                    lines += octets.count(b"\n")
                    break
                if b"client write" in witness.path.read_bytes()[noted_before:]:
                    # It may be on record a little later, where the kernel has found room meanwhile.
                    stuck_from = stuck_from or time.monotonic()
                    if time.monotonic() > stuck_from + 0.15:
                        yield proxy, wire, upstream, numbered, witness, number + 1
                        return
                assert time.monotonic() < until, "neither on record nor stuck"
                time.sleep(0.0005)
            assert lines == number + 1
        pytest.fail("the client's socket takes all there is")


# A unix socket takes a small write whole or not at all; a TCP socket takes as much of a large one as fits.
_REFUSED = {("unix", 4_000): "client write BlockingIOError", ("tcp", 60_000): "client write in part"}
_UNREAD = [("tcp", 60_000), ("tcp", 4_000), ("unix", 60_000), ("unix", 4_000), ("tls", 60_000), ("chunks", 30_000)]


@pytest.mark.parametrize(("kind", "size"), _UNREAD)
def test_a_client_that_reads_late_gets_every_octet(
    kind: str, size: int, tmp_path: pathlib.Path, certificates: Certificates
) -> None:
    with _stalled(size, tmp_path, kind, certificates if kind == "tls" else None) as (
        proxy, wire, upstream, numbered, witness, count,
    ):  # fmt: skip
        assert witness.seen(f"/{count - 1:07d}") == [IN_VAIN, RELAY]
        refused = witness.seen("-")[0]
        if (kind, size) in _REFUSED:
            assert refused == _REFUSED[kind, size]
        assert len(proxy.requests()) == count - 1
        for number in range(count):
            response = wire.read_response()
            assert response.status == 200
            assert response.body == numbered.body(number), number
            assert response.get_all("connection") == []
        for number in (count, count + 1):
            wire.get(f"/{number:07d}")
            assert wire.read_response().body == numbered.body(number)
        # A busy machine may find some answers late.
        assert any(witness.seen(f"/{number:07d}") == [AT_ONCE] for number in range(count + 2))
        records = proxy.wait_requests(count + 2)
        for record in records:
            check_record(record)
            assert (record["event"], record["status"]) == ("request.complete", 200)
            assert record["bytes"]["response_body"] == len(numbered.body(0))
            assert record["bytes"]["upstream_read"] == len(numbered.answer(0))
        if kind != "tls":  # there what it read is what was encrypted
            assert {record["bytes"]["client_written"] for record in records} == {wire.received.count // (count + 2)}
        assert wire.received.count == sum(record["bytes"]["client_written"] for record in records)
        assert wire.sent.count == sum(record["bytes"]["client_read"] for record in records)
        assert len(upstream.wires) == 1
        (peer,) = upstream.wires
        assert peer.received.count == sum(record["bytes"]["upstream_written"] for record in records)
        assert peer.sent.count == sum(record["bytes"]["upstream_read"] for record in records)


@pytest.mark.parametrize(
    ("kind", "size"), [("tcp", 60_000), ("unix", 60_000), ("unix", 4_000), ("tls", 60_000), ("chunks", 30_000)]
)
def test_a_client_that_resets_unread_answers_did_it(
    kind: str, size: int, tmp_path: pathlib.Path, certificates: Certificates
) -> None:
    with _stalled(size, tmp_path, kind, certificates if kind == "tls" else None) as (
        proxy, wire, upstream, numbered, _, count,
    ):  # fmt: skip
        before = proxy.requests()
        wire.reset()
        *complete, record = proxy.wait_requests(count)
        assert complete == before
        assert {each["event"] for each in complete} == {"request.complete"}
        for each in (*complete, record):
            check_record(each)
        assert (record["event"], record["side"], record["phase"]) == ("request.abort", "client", "response_body")
        # The end of a unix socket with octets unread, and all of what is below, is all a writer gets to see of it.
        assert record["cause"] in (("closed", "reset") if kind == "unix" else ("reset",))
        assert record["operation"] == "write"
        counts = record["bytes"]
        answer = numbered.answer(0)
        whole = complete[0]["bytes"]
        head = whole["client_written"] - len(answer.partition(b"\r\n\r\n")[2])
        assert counts["upstream_read"] == len(answer)
        assert (counts["client_read"], counts["upstream_written"]) == (whole["client_read"], whole["upstream_written"])
        assert 0 <= counts["client_written"] < whole["client_written"]
        assert counts["response_body"] == numbered.content_in(counts["client_written"] - head)
        assert record["status"] == (200 if counts["client_written"] else None)
        upstream.settle()
        assert len(upstream.wires) == 1
        (peer,) = upstream.wires
        assert peer.end == "fin"
        assert peer.received.count == sum(each["bytes"]["upstream_written"] for each in (*complete, record))
        assert peer.sent.count == sum(each["bytes"]["upstream_read"] for each in (*complete, record))
        assert wire.sent.count == sum(each["bytes"]["client_read"] for each in (*complete, record))


# -- when it was ------------------------------------------------------------------------------------------------------


class Timed:
    """Answers a connection's second request in one piece or two, and notes when; the second one some time after it was
    told to.
    """

    def __init__(self, before_s: float, first: bytes, second: bytes = b"") -> None:
        self.before_s = before_s
        self.pieces = first, second
        self.pause_s = 0.05
        self.go_on = threading.Event()
        self.got_at = self.answered_at = 0.0

    def script(self, wire: Wire) -> None:
        """What upstream does."""
        wire.read_request()
        wire.send(FINE)
        wire.read_request()
        self.got_at = time.monotonic()
        time.sleep(self.before_s)  # late is what it shall be
        self.answered_at = time.monotonic()
        wire.send(self.pieces[0])
        if self.pieces[1]:
            assert self.go_on.wait(5)
            time.sleep(self.pause_s)
            wire.send(self.pieces[1])
        wire.await_end()


def _timed(timed: Timed, first: bytes, last: bytes, *options: str) -> tuple[dict[str, float], float]:
    """Make the two requests; upstream's second piece comes when the client has ``first``. Returns: ``timing_s`` of the
    second request, and for how long its client waited.
    """
    with Upstream(timed.script) as upstream, ProxyProcess(upstream.url, *options) as proxy:
        with connect(proxy.address) as wire:
            wire.get()
            assert wire.read_response().status == 200
            sent_at = time.monotonic()
            wire.get()
            wire.read_until(first)
            timed.go_on.set()
            wire.read_until(last)
            waited_s = time.monotonic() - sent_at
        record = proxy.wait_requests(2)[1]
    check_record(record)
    timing: dict[str, float] = record["timing_s"]
    assert list(timing) == ["head", "connected", "request_sent", "first_byte", "last_byte"]
    assert sorted(timing.values()) == list(timing.values())
    return timing, waited_s


_ROUNDED_S = 2e-6  # what rounding takes from a difference
# Between the write and the look at the clock behind it the machine may run something else for a while, and upstream
# has the request already. It does not do so each time.
_AWAY_S = 0.005
_TRIES = 10


@pytest.mark.parametrize("options", [(), ("--upstream-write-timeout", "0.09")], ids=["tried", "relay"])
@pytest.mark.parametrize("before_s", [0.01, 0.06])
def test_a_late_answer_was_asked_for_when_the_request_went_out(before_s: float, options: tuple[str, ...]) -> None:
    for _ in range(_TRIES):
        timed = Timed(before_s, FINE)
        timing, waited_s = _timed(timed, b"HTTP/1.1", b"fine", *options)
        took_s = timed.answered_at - timed.got_at
        assert timing["first_byte"] <= waited_s
        # Upstream has had it for so long: who notes it 20 ms late, when the wait in the read is over, falls below.
        if took_s - _AWAY_S <= timing["first_byte"] - timing["request_sent"]:
            return
    pytest.fail(f"noted as sent {_TRIES} times when it had been for long: {timing}, {took_s}")


@pytest.mark.parametrize(
    ("first", "second", "shown"),
    [(FINE[:-4], b"fine", b"\r\n\r\n"), (FINE[:-2], b"ne", b"\r\n\r\nfi")],
    ids=["behind the head", "in the body"],
)
@pytest.mark.parametrize("before_s", [0.0, 0.06])
def test_the_first_byte_came_when_it_came(first: bytes, second: bytes, shown: bytes, before_s: float) -> None:
    timed = Timed(before_s, first, second)
    timing, waited_s = _timed(timed, shown, second)
    assert timing["last_byte"] - timing["first_byte"] >= timed.pause_s - _ROUNDED_S
    assert timing["first_byte"] <= waited_s - timed.pause_s


def test_the_limit_for_the_answer_runs_from_when_the_request_went_out() -> None:
    limit_s = 0.1
    took: list[float] = []
    for _ in range(_TRIES):
        timed = Timed(limit_s + 0.1, FINE)
        with (
            Upstream(timed.script) as upstream,
            ProxyProcess(upstream.url, "--upstream-head-timeout", str(limit_s)) as proxy,
            connect(proxy.address) as wire,
        ):
            wire.get()
            assert wire.read_response().status == 200
            wire.get()
            assert wire.read_response().status == 504
            upstream.settle()
            record = proxy.wait_requests(2)[1]
        check_record(record)
        assert (record["side"], record["phase"], record["cause"]) == ("upstream", "response_head", "timeout")
        assert record["limit"]["name"] == "upstream_head_timeout"
        assert record["duration_s"] - record["timing_s"]["request_sent"] >= limit_s
        took.append(record["duration_s"])
        if took[-1] < limit_s + 0.018:  # less than by how much it would be late
            return
    pytest.fail(f"ran out after {took}")


def test_the_first_byte_is_that_of_the_final_response() -> None:
    timed = Timed(0.0, b"HTTP/1.1 103 Hints\r\n\r\n", FINE)
    timing, _ = _timed(timed, b"103 Hints", b"fine")
    assert timing["first_byte"] >= timed.pause_s - _ROUNDED_S


# -- a kept connection that has gone stale ----------------------------------------------------------------------------


_AGAIN = {
    "GET": (GET, True),
    "DELETE": (_get(method=b"DELETE"), True),
    "PUT": (_post(b"hello", method=b"PUT"), True),
    "POST": (_post(b"hello"), False),
    "POST of length 0": (_post(b""), False),
    "PATCH": (_post(b"hello", method=b"PATCH"), False),
}


@pytest.mark.parametrize(("end", "cause"), [(RESET, "reset"), (FIN, "closed")])
def test_what_a_stale_connection_lost_is_sent_again_where_that_does_no_harm(
    end: str, cause: str, tmp_path: pathlib.Path
) -> None:
    """A connection that has served something ends when another request comes over it, but for ``/warm``."""

    def script(wire: Wire) -> None:
        while True:
            request = wire.read_request()
            if wire.sent.count and b"/case" in request:
                if end == RESET:
                    wire.reset()
                else:
                    wire.end_write()
                    wire.await_end()
                return
            wire.send(FINE)

    witness = Witness(tmp_path)
    records = 0
    with Upstream(script) as upstream, ProxyProcess(upstream.url, env=witness.env) as proxy:
        for name, (octets, again) in _AGAIN.items():
            with connect(proxy.address) as wire:
                wire.get("/warm")
                assert wire.read_response().status == 200
                before = len(upstream.wires)
                witness.forget()
                wire.send(octets)
                response = wire.read_response()
                records += 2
                record = proxy.wait_requests(records)[-1]
                check_record(record)
                assert witness.seen("/case") == [IN_VAIN, RELAY], name
                assert record["bytes"]["client_read"] == len(octets), name
                assert len(upstream.wires) == before + again, name
                if not again:
                    assert response.status == 502, name
                    assert (record["event"], record["side"], record["cause"]) == ("request.abort", "upstream", cause)
                    assert "attempts" not in record, name
                    assert "on a connection kept from an earlier request" in record["message"], name
                    assert "not sent again, as it might be done twice" in record["message"], name
                    continue
                assert (response.status, response.body) == (200, b"fine"), name
                assert (record["event"], record["status"]) == ("request.complete", 200), name
                (attempt,) = record["attempts"]
                assert (attempt["cause"], attempt["upstream"]) == (cause, upstream.name)
                first, second = upstream.wires[-2:]
                assert bytes(first.received).endswith(bytes(second.received))  # whole, and the same again
                assert record["bytes"]["upstream_written"] == second.received.count, name
                assert record["bytes"]["upstream_read"] == len(FINE), name
                assert record["timing_s"]["connected"] <= record["timing_s"]["request_sent"], name
                # And nothing is left of what was in vain.
                wire.get("/warm")
                assert wire.read_response().body == b"fine"
                records += 1
                assert proxy.wait_requests(records)[-1]["bytes"]["upstream_read"] == len(FINE)
                assert len(upstream.wires) == before + 1


def test_what_a_stale_connection_lost_under_tls_is_told_as_without(certificates: Certificates) -> None:
    """Many servers leave close_notify out where they end an idle connection."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(FINE)
        wire.read_request()
        wire.cut_write()
        wire.await_end()

    with (
        Upstream(script, "tls", tls=certificates.server_context()) as upstream,
        ProxyProcess(upstream.url, "--upstream-ca", certificates.ca) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get("/warm")
        assert wire.read_response().status == 200
        wire.send(_post(b"hello"))
        assert wire.read_response().status == 502
        record = proxy.wait_requests(2)[1]
    check_record(record)
    assert (record["side"], record["phase"], record["cause"]) == ("upstream", "response_head", "tls")
    assert "on a connection kept from an earlier request" in record["message"]
    assert "not sent again, as it might be done twice" in record["message"]


@pytest.mark.parametrize("ways", [AT_ONCE, RELAY])
def test_a_long_target_is_cut_alike_and_marked_in_the_message(ways: str) -> None:
    target = b'/a"b?' + b"x" * 1000
    fields = b"" if ways == AT_ONCE else b"Expect: 100-continue\r\n"
    with Upstream(peers.answer_all(ok(b"1"))) as upstream, ProxyProcess(upstream.url) as proxy:
        with connect(proxy.address) as wire:
            for _ in range(2):
                wire.send(b"POST " + target + b" HTTP/1.1\r\nHost: t\r\nContent-Length: 1\r\n" + fields + b"\r\n1")
                assert wire.read_response().status == 200
        for record in proxy.wait_requests(2):
            check_record(record)
            assert record["target"] == target.decode()
            words = record["message"].partition(" answered ")[0]
            assert words == f"POST {target.decode()}"[:300] + "..."


def test_twice_stale_is_upstreams_doing() -> None:
    """The second connection was a fresh one: that it ends, too, is no accident."""

    def script(wire: Wire) -> None:
        while True:
            if wire.read_request().startswith(b"GET /case"):
                wire.reset()
                return
            wire.send(FINE)

    with Upstream(script) as upstream, ProxyProcess(upstream.url) as proxy, connect(proxy.address) as wire:
        wire.get()
        assert wire.read_response().status == 200
        wire.send(GET)
        assert wire.read_response().status == 502
        record = proxy.wait_requests(2)[1]
        check_record(record)
        assert (record["event"], record["side"], record["cause"]) == ("request.abort", "upstream", "reset")
        assert len(record["attempts"]) == 1
        assert len(upstream.wires) == 2


# -- chunks of one size in a row --------------------------------------------------------------------------------------

_LINES = (b"%x", b"%X", b"0%x", b"0%X", b"00000%x", b"%08x", b"%09x", b"%015x")


@st.composite
def _rows(draw: st.DrawFn) -> tuple[bytes, int]:
    """Chunked bodies made of rows of chunks with the very same line, and the octets of content in them."""
    octets = bytearray()
    content = 0
    filler = itertools.cycle(b"0123\r\n\r\na\r\n\n\r5\r\n")  # content that looks like framing
    for _ in range(draw(st.integers(0, 6))):
        size = draw(st.one_of(st.integers(1, 20), st.sampled_from([2, 10, 15, 16, 26, 171, 255, 4096])))
        line = draw(st.sampled_from(_LINES)) % size + draw(st.sampled_from([b"", b"", b"", b";a", b";a=b"]))
        for _ in range(draw(st.sampled_from([1, 1, 2, 3, 7]))):
            octets += line + b"\r\n" + bytes(itertools.islice(filler, size)) + b"\r\n"
            content += size
    octets += draw(st.sampled_from([b"0\r\n\r\n", b"000\r\n\r\n", b"00000000\r\nX: y\r\n\r\n", b"0;a\r\n\r\n"]))
    return bytes(octets), content


@st.composite
def _spoiled_rows(draw: st.DrawFn) -> bytes:
    """Such bodies with an octet or two changed, put in or taken out, or cut short, with octets behind."""
    octets = draw(_rows())[0]
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        at = draw(st.integers(0, len(octets)))
        odd = draw(st.sampled_from([b"", b"\r", b"\n", b"\r\n", b"0", b"f", b"g", b";", b" ", b"\x00", b"0\r\n"]))
        octets = octets[:at] + odd + octets[at + draw(st.integers(0, 3)) :]
    return octets + draw(st.sampled_from([b"", b"GET / HTTP/1.1\r\n", b"0\r\n\r\n"]))


_Stand = tuple[int, int, bool, object, int, int, bool, int]


def _stand(framing: ChunkedFraming) -> _Stand:
    """Returns: all that the rest of the proxy asks a framing for."""
    mark = framing.mark
    return (
        framing.content, len(framing.line), framing.complete, mark, framing.opaque(), framing.undecided,
        framing.between_chunks, framing.trailer_fields,
    )  # fmt: skip


def _by_octet(octets: bytes) -> tuple[list[_Stand], int | None]:
    """Feed octet by octet: no row of chunks is ever seen. Returns: how the framing stood before each octet and at the
    end, and at which it was malformed.
    """
    framing = ChunkedFraming()
    stands = [_stand(framing)]
    for at in range(len(octets)):
        if framing.complete:
            break
        try:
            assert framing.feed(octets, at, at + 1) == at + 1
        except MalformedMessage:
            return stands, at
        stands.append(_stand(framing))
    return stands, None


_Cuts = list[int]
_cuts = st.lists(st.integers(0, 400), max_size=8)


def _feed_in_pieces(octets: bytes, cuts: _Cuts, buffer: type[bytes] | type[bytearray]) -> None:
    """Feed pieces, each in the midst of other octets, and compare with ``_by_octet`` at each cut."""
    stands, malformed_at = _by_octet(octets)
    framing = ChunkedFraming()
    ends = [*sorted({cut for cut in cuts if cut < len(octets)}), len(octets)]
    at = 0
    for end in ends:
        piece = b"5\r\n" + octets[at:end] + b"\r\n1\r\nx\r\n"
        try:
            stop = framing.feed(buffer(piece), 3, 3 + end - at) - 3
        except MalformedMessage:
            assert malformed_at is not None
            assert at <= malformed_at < end
            return
        assert malformed_at is None or malformed_at >= end
        assert at + stop == min(end, len(stands) - 1)
        at += stop
        assert _stand(framing) == stands[at]
        if framing.complete:
            return


@settings(deadline=None)  # a busy machine
@given(_rows(), _cuts, st.sampled_from([bytes, bytearray]))
def test_a_row_of_chunks_is_as_many_chunks(
    rows: tuple[bytes, int], cuts: _Cuts, buffer: type[bytes] | type[bytearray]
) -> None:
    octets, content = rows
    stands, malformed_at = _by_octet(octets)
    assert malformed_at is None
    assert stands[-1][0] == content
    assert stands[-1][2]
    assert len(stands) == len(octets) + 1
    _feed_in_pieces(octets, cuts, buffer)


@settings(deadline=None)
@given(_spoiled_rows(), _cuts, st.sampled_from([bytes, bytearray]))
def test_a_row_of_chunks_that_breaks_off_breaks_off_there(
    octets: bytes, cuts: _Cuts, buffer: type[bytes] | type[bytearray]
) -> None:
    _feed_in_pieces(octets, cuts, buffer)


def test_a_row_of_chunks_cut_everywhere() -> None:
    octets = (
        (b"A\r\n0123456789\r\n" * 3 + b"a\r\n\r\n\r\n\r\n\r\n\r\n\r\n" * 3) + b"0a\r\n0123456789\r\n" + b"0\r\n\r\n"
    )
    for cut in range(len(octets)):
        for other in range(cut, len(octets), 3):
            _feed_in_pieces(octets, [cut, other], bytes)


# -- how it is scheduled ----------------------------------------------------------------------------------------------


def _policies(pids: list[int]) -> set[int]:
    """Returns: the policies of all threads of some processes."""
    return {os.sched_getscheduler(int(task)) for pid in pids for task in os.listdir(f"/proc/{pid}/task")}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_workers_are_batch(workers: str) -> None:
    with Upstream(peers.answer_all(FINE)) as upstream, ProxyProcess(upstream.url, "--workers", workers) as proxy:
        with connect(proxy.address) as wire:
            wire.get()
            assert wire.read_response().status == 200
            assert len(proxy.worker_pids()) == int(workers)
            assert _policies(proxy.worker_pids()) == {os.SCHED_BATCH}


@pytest.mark.parametrize(
    ("prefix", "policy"),
    [
        (("chrt", "--rr", "1"), os.SCHED_RR),
        (("chrt", "--idle", "0"), os.SCHED_IDLE),
    ],
    ids=["rr", "idle"],
)
def test_a_policy_that_somebody_chose_is_left_alone(prefix: tuple[str, ...], policy: int) -> None:
    try:
        tried = subprocess.run([*prefix, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no chrt here: apt install util-linux")
    if tried.returncode:
        pytest.skip(f"not permitted here: {tried.stderr.decode().strip()}")
    with (
        Upstream(peers.answer_all(FINE)) as upstream,
        ProxyProcess(upstream.url, prefix=prefix) as proxy,
        connect(proxy.address) as wire,
    ):
        wire.get()
        assert wire.read_response().status == 200
        assert _policies(proxy.worker_pids()) == {policy}


# -- connections that are accepted when their client has spoken -------------------------------------------------------


# Less than the second after which the kernel passes on a connection that says nothing.
_AT_FIRST_WORD_S = 0.9


def _ends_of(proxy: ProxyProcess) -> list[LogRecord]:
    return [record for record in proxy.records() if record["event"] == "connection.close"]


def test_a_silent_connection_is_accepted_after_about_a_second() -> None:
    with Upstream(peers.answer_all(FINE)) as upstream, ProxyProcess(upstream.url) as proxy:
        files = proxy.open_files()
        began_at = time.monotonic()
        with connect(proxy.address):
            wait_until(lambda: proxy.open_files() == files + 1, what="its being accepted")
            assert time.monotonic() - began_at >= 0.9
        wait_until(lambda: proxy.open_files() == files, what="its end")
        assert not proxy.requests()


def test_a_silent_connection_ends_as_an_idle_one() -> None:
    limit_s = 0.3
    with (
        Upstream(peers.answer_all(FINE)) as upstream,
        ProxyProcess(upstream.url, "--keepalive-timeout", str(limit_s), "--log-level", "debug") as proxy,
    ):
        began_at = time.monotonic()
        with connect(proxy.address) as silent:
            # Nobody else waits for it.
            with connect(proxy.address) as wire:
                asked_at = time.monotonic()
                wire.get()
                assert wire.read_response().body == b"fine"
                assert time.monotonic() - asked_at < _AT_FIRST_WORD_S
            assert silent.await_end() == "fin"
            assert silent.ended_at is not None
            took_s = silent.ended_at - began_at
        assert limit_s <= took_s < limit_s + 4
        closed = [record for record in _ends_of(proxy) if record["requests"] == 0]
        assert [(record["level"], record["why"]) for record in closed] == [("debug", "idle")]
        assert len(proxy.wait_requests(1)) == 1


@pytest.mark.parametrize("pause_s", [0.0, 1.3])
def test_a_connection_is_served_at_once_when_it_speaks(pause_s: float) -> None:
    with (
        Upstream(peers.answer_all(FINE)) as upstream,
        ProxyProcess(upstream.url) as proxy,
        connect(proxy.address) as wire,
    ):
        time.sleep(pause_s)  # before, and after, the kernel has given it up and passed it on silent
        asked_at = time.monotonic()
        wire.send(GET[:5])
        wire.send(GET[5:])
        assert wire.read_response().body == b"fine"
        assert time.monotonic() - asked_at < _AT_FIRST_WORD_S
        record = proxy.next_request()
        check_record(record)
        # A request begins with its first byte, however long its connection stood there before.
        assert record["duration_s"] < _AT_FIRST_WORD_S
        assert record["bytes"]["client_read"] == len(GET)


@pytest.mark.parametrize("end", [FIN, RESET])
def test_who_connects_and_leaves_costs_nothing(end: str) -> None:
    with (
        Upstream(peers.answer_all(FINE)) as upstream,
        ProxyProcess(upstream.url, "--log-level", "debug") as proxy,
    ):
        with connect(proxy.address) as wire:
            wire.get()
            assert wire.read_response().status == 200
        wait_until(lambda: len(_ends_of(proxy)) == 1)
        files, used_s = proxy.open_files(), proxy.cpu_s()
        for _ in range(200):
            with connect(proxy.address) as wire:
                if end == RESET:
                    wire.reset()
        with connect(proxy.address) as wire:
            wire.get()
            assert wire.read_response().status == 200  # those before it have been through the queue
        wait_until(lambda: proxy.open_files() <= files, what="the end of all of them")
        assert proxy.cpu_s() - used_s < 1.0
        others = {record["event"] for record in proxy.records()} - {"connection.close", "request.complete"}
        assert others == {"server.start"}
        assert {record["level"] for record in _ends_of(proxy)} == {"debug"}
        proxy.wait_requests(2)
        assert upstream.wires[0].received.count > 0
        assert len(upstream.wires) == 1
        assert "error" not in {record["level"] for record in proxy.records()}
