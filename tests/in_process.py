"""Connections that are served in this process, where it can be asked what there is, and changed what there will be."""

import collections.abc
import contextlib
import dataclasses
import os
import socket
import threading

from peers import Wire, connect
from proxy.config import load_settings
from proxy.exchange import ClientConnection, Worker
from proxy.inflight import InFlightTable
from proxy.log import EventLog
from proxy.record import Tally
from proxy.relay import Bustle
from proxy.tls import read_contexts
from proxy.upstream import upstream_pool
from proxy.waiting import Control


@contextlib.contextmanager
def make_worker(log: EventLog, *options: str) -> collections.abc.Iterator[Worker]:
    """Give what connections are served with. ``log`` is the fixture."""
    with contextlib.ExitStack() as stack:
        settings = load_settings(options, {})
        reading, writing = os.pipe()
        stack.callback(os.close, writing)
        stack.callback(os.close, reading)
        tally = Tally(memoryview(bytearray(8 * len(Tally.NAMES))).cast("Q"))
        contexts = read_contexts(settings)
        pool = upstream_pool(settings, contexts.upstream)
        stack.callback(pool.close)
        slots = InFlightTable(1, 64).slots(0)
        bustle = Bustle(memoryview(bytearray(8)).cast("d"), 0)
        yield Worker(settings, log, tally, Control(reading), pool, contexts.server, slots, bustle)


@dataclasses.dataclass
class Server:
    """Serves connections, each by a thread of its own."""

    worker: Worker
    listener: socket.socket

    @contextlib.contextmanager
    def client(self) -> collections.abc.Iterator[Wire]:
        """Give a client. Leaving the context waits until its connection is served no more."""
        with connect(self.listener.getsockname()) as wire:
            sock, _ = self.listener.accept()
            thread = threading.Thread(target=self._serve, args=(sock,))
            del sock
            thread.start()
            yield wire
        thread.join(10)
        assert not thread.is_alive()

    def _serve(self, sock: socket.socket) -> None:
        ClientConnection(self.worker, sock, "127.0.0.1:1", "127.0.0.1", overflow=False).serve()


@contextlib.contextmanager
def serving(log: EventLog, *options: str) -> collections.abc.Iterator[Server]:
    """Give a server with these options, written as on the command line. ``log`` is the fixture."""
    with make_worker(log, *options) as worker, socket.create_server(("127.0.0.1", 0)) as listener:
        yield Server(worker, listener)
