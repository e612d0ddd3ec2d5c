"""A transfer in bulk gives way while others move: smaller portions, with a pause after each. How much it helps is for
``scripts/bench --figures fairness``; here it is looked at whether it happens, and only then.
"""

import collections.abc
import contextlib
import pathlib
import ssl
import threading
import time

import pytest

import harness
from conftest import Certificates
from harness import ProxyProcess, wait_until
from peers import Upstream, Wire, chunk, connect, ok

_SIZE = 16 * 1024 * 1024
_LARGE = ok(b"l" * _SIZE)
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + 256 * chunk(b"l" * 65536) + b"0\r\n\r\n"
_ALONE = 1024 * 1024
_BESIDE_OTHERS = 256 * 1024

_WITNESS = """
import os
import time
from proxy import relay

_fd = os.open(os.environ["WITNESS"], os.O_WRONLY | os.O_APPEND)
_is_on = relay.Bustle.is_on
_fill, _read_upstream, _sleep = relay.SplicePipe.fill, relay.Relay._read_upstream, time.sleep


class Clock:
    monotonic = time.monotonic

    @staticmethod
    def sleep(seconds):
        os.write(_fd, b"pause 1\\n")
        _sleep(seconds)


def fill(self, fd, count):
    os.write(_fd, b"portion %d\\n" % count)
    return _fill(self, fd, count)


def read_upstream(self, now, **options):
    before = self.response.read
    _read_upstream(self, now, **options)
    os.write(_fd, b"read %d\\n" % (self.response.read - before))


relay.time = Clock
relay.SplicePipe.fill = fill
relay.Relay._read_upstream = read_upstream
"""


class Witness:
    """What transfers in bulk did in the proxy's processes."""

    def __init__(self, directory: pathlib.Path) -> None:
        (directory / "sitecustomize.py").write_text(_WITNESS)
        self.path = directory / "seen"
        self.path.touch()
        self.env = {"PYTHONPATH": f"{directory}:{harness.ROOT}", "WITNESS": str(self.path)}
        self._from = 0

    def forget(self) -> None:
        """Look only at what comes from now on."""
        self._from = len(self.path.read_text().splitlines())

    def seen(self, what: str) -> list[int]:
        """Returns: the numbers noted of it since then."""
        lines = [line.split() for line in self.path.read_text().splitlines()[self._from :]]
        return [int(number) for about, number in lines if about == what]


def _serve(wire: Wire) -> None:
    while True:
        target = wire.read_request().split()[1]
        if target == b"/large":
            wire.send(_LARGE)
        elif target == b"/chunked":
            wire.send(_CHUNKED)
        elif target == b"/mixed":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _SIZE)
            small = b"s" * 64
            for _ in range(16):
                wire.send(b"l" * (_SIZE // 16 - 20 * len(small)))
                for _ in range(20):
                    wire.send(small)
                    time.sleep(0.001)  # each on its own
        elif target == b"/late":
            time.sleep(0.3)  # longer than a relay is in its beginning
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % _SIZE)
            time.sleep(0.002)  # on its own
            wire.send(b"l" * _SIZE)
        elif target == b"/lines":
            wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                wire.send(chunk(b"line\n"))
                time.sleep(0.005)  # as a daemon that has something to say from time to time
        else:
            wire.send(ok(b"small"))


@contextlib.contextmanager
def _proxy(
    tmp_path: pathlib.Path, *options: str, certificates: Certificates | None = None
) -> collections.abc.Iterator[tuple[ProxyProcess, Witness]]:
    witness = Witness(tmp_path)
    if certificates is not None:
        options = (*options, "--tls-cert", certificates.server)
    with Upstream(_serve) as upstream, ProxyProcess(upstream.url, *options, env=witness.env) as proxy:
        yield proxy, witness


def _download(wire: Wire, target: str = "/large") -> None:
    wire.get(target)
    response = wire.read_response()
    assert response.status == 200
    assert len(response.body) == _SIZE


@contextlib.contextmanager
def _lines(proxy: ProxyProcess, count: int = 1) -> collections.abc.Iterator[None]:
    """Let so many streams of lines run meanwhile."""
    ended = threading.Event()

    def read(wire: Wire, begun: threading.Barrier) -> None:
        for _ in range(20):
            wire.read()
        begun.wait(10)
        while not ended.is_set():
            wire.read()

    with contextlib.ExitStack() as stack:
        begun = threading.Barrier(count + 1)
        for _ in range(count):
            wire = stack.enter_context(connect(proxy.address))
            wire.get("/lines")
            thread = threading.Thread(target=read, args=(wire, begun))
            thread.start()
            stack.callback(thread.join, 10)
        stack.callback(ended.set)
        begun.wait(10)
        yield


@contextlib.contextmanager
def _small_requests(proxy: ProxyProcess, tls: ssl.SSLContext | None = None) -> collections.abc.Iterator[None]:
    """Let one small request after another be made meanwhile."""
    begun, ended = threading.Event(), threading.Event()

    def ask() -> None:
        with connect(proxy.address, tls) as wire:
            while not ended.is_set():
                wire.get("/small")
                assert wire.read_response().body == b"small"
                begun.set()
                time.sleep(0.005)  # they are not meant to fill the machine

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(10)
        yield
    finally:
        ended.set()
        thread.join(10)


def _gave_way(witness: Witness) -> bool:
    """Whether all portions since were small ones, but for those before anybody had moved."""
    portions = witness.seen("portion")
    assert portions
    small = [portion for portion in portions if portion <= _BESIDE_OTHERS]
    return len(small) > 0.9 * len(portions) and len(witness.seen("pause")) > 0.5 * len(small)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_download_gives_way_to_lines_and_goes_on_alone_as_before(workers: str, tmp_path: pathlib.Path) -> None:
    """Whichever worker has the lines: of two, with eight streams, each has some."""
    with _proxy(tmp_path, "--workers", workers) as (proxy, witness), connect(proxy.address) as wire:
        _download(wire)
        assert max(witness.seen("portion")) == _ALONE
        assert witness.seen("pause") == []
        with _lines(proxy, 8 if workers == "2" else 1):
            witness.forget()
            _download(wire)
            assert _gave_way(witness)

        def as_before() -> bool:
            witness.forget()
            _download(wire)
            return max(witness.seen("portion")) == _ALONE and not witness.seen("pause")

        wait_until(as_before)
        for record in proxy.requests():
            if record["target"] == "/large":
                assert record["event"] == "request.complete"


def test_a_download_gives_way_to_small_requests(tmp_path: pathlib.Path) -> None:
    with _proxy(tmp_path) as (proxy, witness), connect(proxy.address) as wire, _small_requests(proxy):
        _download(wire)
        assert _gave_way(witness)


def test_downloads_do_not_give_way_to_each_other(tmp_path: pathlib.Path) -> None:
    with _proxy(tmp_path) as (proxy, witness):
        for _ in range(5):
            witness.forget()
            with connect(proxy.address) as wire, connect(proxy.address) as other:
                wire.get("/large")
                _download(other)
                assert wire.read_response().status == 200
            if not witness.seen("pause"):
                return
            # On a busy machine one may have come in drops for a while, as lines do.
            time.sleep(1.1)  # until those are forgotten
        pytest.fail("they gave way, five times")


@pytest.mark.parametrize("target", ["/mixed", "/late"])
def test_a_download_does_not_give_way_to_its_own_small_portions(target: str, tmp_path: pathlib.Path) -> None:
    """Neither to those in the middle of it nor to those it begins with."""
    with _proxy(tmp_path) as (proxy, witness), connect(proxy.address) as wire:
        for _ in range(5):
            witness.forget()
            _download(wire, target)
            assert max(witness.seen("portion")) > _BESIDE_OTHERS
            if not witness.seen("pause"):
                return
            time.sleep(1.1)  # as above: on a busy machine it may have stood still between two of them
        pytest.fail("it gave way, five times")


@pytest.mark.parametrize("way", ["chunked", "tls"])
def test_so_does_what_is_copied(way: str, tmp_path: pathlib.Path, certificates: Certificates) -> None:
    secure = certificates if way == "tls" else None
    target = "/chunked" if way == "chunked" else "/large"
    with _proxy(tmp_path, certificates=secure) as (proxy, witness):
        tls = certificates.client_context() if secure else None
        with connect(proxy.address, tls) as wire:

            def reads_much() -> bool:
                witness.forget()
                _download(wire, target)
                assert not witness.seen("pause")
                return max(witness.seen("read")) > _BESIDE_OTHERS

            wait_until(reads_much)
            with _small_requests(proxy, tls):
                witness.forget()
                _download(wire, target)
                assert max(witness.seen("read")) <= _BESIDE_OTHERS
                assert witness.seen("pause")
