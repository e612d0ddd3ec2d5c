"""What may happen between a write that the client took in part and the relay that goes on with it: the worker loses the
processor there for half a second, which a witness makes sure of.
"""

import pathlib
import signal
import time

import harness
from harness import LogRecord, ProxyProcess, check_record
from peers import Upstream, Wire, connect, ok

_BODY = b"".join(b"%07d\n" % number for number in range(7500))
_SLOW = """
import os
import time
from proxy.exchange import ClientConnection

real = ClientConnection._relay


def relay(self, record, *rest):
    if record.at_once is not None and record.at_once.client_written:
        open(os.environ["MARK"], "w").close()
        time.sleep(0.5)
    return real(self, record, *rest)


ClientConnection._relay = relay
"""


def _serve(wire: Wire) -> None:
    while True:
        wire.read_head()
        wire.send(ok(_BODY))


def _stall(proxy: ProxyProcess, wire: Wire, mark: pathlib.Path) -> int | None:
    """Make requests and read no answer until one is taken in part. Returns: how many; None where that one was not
    answered at once, as may be on a busy machine, and a relay has found the client's socket full.
    """
    for number in range(1, 1000):
        wire.get(f"/{number}")
        until = time.monotonic() + 3
        while len(proxy.requests()) < number:
            if mark.exists():
                return number
            if time.monotonic() > until:
                return None
            time.sleep(0.003)
    raise AssertionError("the client's socket takes all there is")


def _run(directory: pathlib.Path, *options: str, drain: bool) -> tuple[list[bytes], Wire, list[LogRecord]]:
    for _ in range(5):
        found = _try(directory, *options, drain=drain)
        if found is not None:
            return found
    raise AssertionError("no answer was taken in part at once")


def _try(directory: pathlib.Path, *options: str, drain: bool) -> tuple[list[bytes], Wire, list[LogRecord]] | None:
    (directory / "sitecustomize.py").write_text(_SLOW)
    mark = directory / "mark"
    env = {"PYTHONPATH": f"{directory}:{harness.ROOT}", "MARK": str(mark)}
    with (
        Upstream(_serve) as upstream,
        ProxyProcess(upstream.url, "--drain-timeout", "5", *options, env=env) as proxy,
        connect(proxy.address, receive_buffer=4096) as wire,
    ):
        count = _stall(proxy, wire, mark)
        if count is None:
            return None
        if drain:
            proxy.send_signal(signal.SIGTERM)
        time.sleep(0.6)
        bodies = [wire.read_response().body for _ in range(count - 1)]
        last = wire.read_head()
        rest = b""
        while len(rest) < len(_BODY) and (part := wire.read()):
            rest += part
        bodies.append(rest)
        assert last.startswith(b"HTTP/1.1 200")
        if drain:
            proxy.await_stop()
        else:
            proxy.wait_requests(count)
        return bodies, wire, proxy.requests()


def test_a_drain_does_not_shift_a_response_that_is_half_out(tmp_path: pathlib.Path) -> None:
    """The relay adds "Connection: close", 19 octets, to a head that has gone out without it."""
    bodies, wire, records = _run(tmp_path, drain=True)
    assert bodies == [_BODY] * len(bodies)
    assert wire.received.count == sum(record["bytes"]["client_written"] for record in records)


def test_a_limit_that_runs_out_behind_half_a_response_knows_of_it(tmp_path: pathlib.Path) -> None:
    _, wire, records = _run(tmp_path, "--upstream-head-timeout", "0.3", drain=False)
    record = records[-1]
    check_record(record)
    assert wire.received.count == sum(record["bytes"]["client_written"] for record in records)
    assert record["status"] == 200  # is what the client was sent
    assert record["bytes"]["upstream_read"] == len(ok(_BODY))
