"""kernel: what the kernel is asked, against real peers that are alive, paused, slow and dead."""

import collections.abc
import contextlib
import os
import resource
import select
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import harness
import netns
import peers
from proxy import kernel


@contextlib.contextmanager
def _pair() -> collections.abc.Iterator[tuple[socket.socket, socket.socket]]:
    """Give the two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        yield near, far


def _fill(sock: socket.socket) -> int:
    """Write until the socket takes nothing more for a while. Returns: how many octets it took."""
    sock.setblocking(False)
    count = 0
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    settled = False
    while True:
        try:
            count += sock.send(bytes(65536))
            settled = False
        except BlockingIOError:
            if settled:
                return count
            settled = not poller.poll(200)  # meanwhile the other side may take enough for one more packet


# -- TCP_INFO ---------------------------------------------------------------------------------------------------------


def test_info_counts_what_passed() -> None:
    with _pair() as (near, far):
        near.sendall(b"x" * 5000)
        assert far.recv(5000, socket.MSG_WAITALL) == b"x" * 5000
        far.sendall(b"y" * 300)
        assert near.recv(300, socket.MSG_WAITALL) == b"y" * 300
        info = kernel.tcp_info(near)
    assert info is not None
    assert info.state == "ESTABLISHED"
    assert 5000 <= info.bytes_acked <= 5001  # the SYN counts too
    assert (info.unacked, info.notsent_bytes, info.probes, info.retransmits, info.total_retransmits) == (0,) * 5
    assert info.segments_received >= 2
    assert 0 < info.rtt_s < 1
    assert info.snd_wnd is None or info.snd_wnd > 0
    assert info.verdict() == "idle"


def test_info_names_states_as_the_rfc_does() -> None:
    def state(sock: socket.socket) -> str | None:
        info = kernel.tcp_info(sock)
        return info.state if info else None

    def becomes(sock: socket.socket, name: str) -> bool:
        until = time.monotonic() + 2
        while state(sock) != name and time.monotonic() < until:
            time.sleep(0.001)
        return state(sock) == name

    with _pair() as (near, far):
        near.shutdown(socket.SHUT_WR)
        assert becomes(near, "FIN_WAIT_2")
        assert becomes(far, "CLOSE_WAIT")
        far.close()
        assert becomes(near, "TIME_WAIT") or state(near) == "CLOSED"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert state(listener) == "LISTEN"


@pytest.mark.parametrize("kind", ["unix", "closed", "udp"])
def test_nothing_is_known_and_nothing_raised_elsewhere(kind: str) -> None:
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as sock:
        if kind == "closed":
            sock.close()
        assert kernel.tcp_info(sock) is None
        assert kernel.socket_evidence(sock) is None
        assert kernel.PeerPulse().silent_s(sock, 5.0) == 0.0


def test_a_short_answer_of_an_older_kernel_is_read_as_far_as_it_goes() -> None:
    class OldKernel:
        """Stands for a kernel that ends its answer before tcpi_snd_wnd, which no kernel here can be made to do."""

        family = socket.AF_INET

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def getsockopt(self, level: int, name: int, size: int) -> bytes:
            return self.sock.getsockopt(level, name, size)[:192]

    with _pair() as (near, _):
        whole = kernel.tcp_info(near)
        short = kernel.tcp_info(OldKernel(near))  # type: ignore[arg-type]  # has all that is used
    assert whole is not None
    assert short is not None
    assert short.snd_wnd is None
    assert (short.state, short.bytes_acked, short.rtt_s) == (whole.state, whole.bytes_acked, whole.rtt_s)


def test_unacknowledged_bytes() -> None:
    with _pair() as (near, far):
        assert kernel.unacknowledged_bytes(near) == 0
        sent = _fill(near)
        held = kernel.unacknowledged_bytes(near)
        info = kernel.tcp_info(near)
        assert held is not None
        assert info is not None
        assert 0 < held <= sent
        assert info.bytes_acked - 1 <= sent - held <= info.bytes_acked
        assert kernel.unacknowledged_bytes(far) == 0
        near.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            kernel.unacknowledged_bytes(near)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        assert kernel.unacknowledged_bytes(sock) is None


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_progress_grows_exactly_as_the_peer_takes_something(kind: str) -> None:
    with contextlib.ExitStack() as stack:
        near, far = stack.enter_context(_pair()) if kind == "tcp" else socket.socketpair()
        stack.enter_context(near)
        stack.enter_context(far)
        sent = _fill(near)
        before = kernel.acknowledged_progress(near)
        assert before is not None
        assert kernel.acknowledged_progress(near) == before
        left = sent // 2
        while left:
            left -= len(far.recv(min(left, 65536)))
        deadline = time.monotonic() + 2
        while (after := kernel.acknowledged_progress(near)) == before:
            assert time.monotonic() < deadline, "reading was no progress"
        assert after is not None
        assert after > before
        near.close()
        assert kernel.acknowledged_progress(near) is None


# -- the verdict ------------------------------------------------------------------------------------------------------


def _info(**changes: object) -> kernel.TcpInfo:
    values: dict[str, object] = dict.fromkeys(kernel.TcpInfo.__slots__, 0)
    values |= {"state": "ESTABLISHED", "snd_wnd": 65536, "rtt_s": 0.001} | changes
    return kernel.TcpInfo(**values)  # type: ignore[arg-type]  # a table of made-up values


@pytest.mark.parametrize(
    ("changes", "questioned", "verdict"),
    [
        ({}, False, "idle"),
        ({"last_ack_s": 900.0, "last_data_recv_s": 900.0, "last_data_sent_s": 900.0}, False, "idle"),
        ({"unacked": 3, "last_ack_s": 0.2, "last_data_recv_s": 9.0, "last_data_sent_s": 0.1}, True, "moving"),
        # Sent and heard within one jiffy: if no answer comes, the kernel sends again.
        ({"unacked": 3, "last_ack_s": 0.2, "last_data_sent_s": 0.2}, False, "moving"),
        ({"notsent_bytes": 9, "snd_wnd": 0, "last_ack_s": 100.0}, False, "paused"),
        ({"notsent_bytes": 9, "snd_wnd": None, "last_ack_s": 100.0}, False, "paused"),
        ({"notsent_bytes": 9, "snd_wnd": 0, "probes": 1}, True, "paused"),
        ({"notsent_bytes": 9, "snd_wnd": 0, "probes": 3}, True, "dead"),
        # A receiver out of memory answers each retransmission with a closed window, and takes nothing.
        (
            {"unacked": 1, "snd_wnd": 0, "retransmits": 9, "last_data_sent_s": 50.0, "last_ack_s": 50.0},
            False,
            "paused",
        ),
        ({"unacked": 1, "retransmits": 1, "last_ack_s": 1.0, "last_data_recv_s": 1.0}, True, "slow_network"),
        ({"unacked": 1, "rtt_s": 0.8, "last_data_sent_s": 1.0}, False, "slow_network"),
        ({"unacked": 1, "retransmits": 3, "last_ack_s": 2.0, "last_data_recv_s": 2.0}, True, "dead"),
        ({"probes": 2, "last_ack_s": 7.0}, True, "idle"),
        ({"state": "CLOSED", "probes": 2}, True, "dead"),
        ({"state": "CLOSED", "retransmits": 1}, False, "dead"),
        ({"state": "CLOSED"}, False, "idle"),
    ],
)
def test_verdict_of_one_look(changes: dict[str, object], questioned: bool, verdict: str) -> None:
    info = _info(**changes)
    assert info.questioned is questioned
    assert info.verdict() == verdict


def test_a_peer_that_has_reset_the_connection_was_not_dead() -> None:
    """What its kernel left unanswered before it came to that says nothing any more."""
    for changes in ({"state": "CLOSED", "probes": 3}, {"state": "CLOSED", "retransmits": 1, "notsent_bytes": 9}):
        assert _info(**changes).verdict() == "dead"
        assert _info(**changes).verdict(alive=True) == "idle"


def test_evidence_has_the_fields_of_the_contract() -> None:
    with _pair() as (near, _):
        _fill(near)
        evidence = kernel.socket_evidence(near)
        assert evidence is not None
        assert set(evidence) == {
            "unacked_bytes", "notsent_bytes", "retransmits", "rtt_s", "last_ack_s", "last_data_recv_s",
            "rwnd_limited_s", "busy_s", "state", "verdict",
        }  # fmt: skip
        assert evidence["verdict"] == "paused"
        dead = kernel.socket_evidence(near, dead=True)
        assert dead is not None
        assert dead["verdict"] == "dead"


# -- peers that pause and die, in namespaces --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> collections.abc.Iterator[netns.Network]:
    reason = netns.why_not()
    if reason is not None:
        pytest.skip(reason)
    with netns.Network() as network:
        yield network


@pytest.fixture
def link(network: netns.Network) -> collections.abc.Iterator[netns.Network]:
    network.restore()
    yield network
    network.restore()


@contextlib.contextmanager
def _far_pair(link: netns.Network, dead_s: float) -> collections.abc.Iterator[tuple[socket.socket, socket.socket]]:
    with netns.inside(link.there):
        listener = socket.create_server((netns.THERE_IP, 0))
    with listener:
        with netns.inside(link.here):
            near = socket.socket()
        with near:
            kernel.prepare_socket(near, dead_s, None)
            near.settimeout(5)
            near.connect(listener.getsockname())
            far, _ = listener.accept()
            with far:
                yield near, far
                # With the link dropping, close() would leave its FIN to be retransmitted for minutes.
                if near.fileno() >= 0:
                    kernel.reset_on_close(near)


def _watch(sock: socket.socket, seconds: float, until_silent_s: float | None = None) -> tuple[float, float, str]:
    """Look every 20 ms. Returns: the longest silence, when it ended or ``until_silent_s`` was reached, the last
    verdict.
    """
    pulse = kernel.PeerPulse()
    began_at = time.monotonic()
    worst = 0.0
    while (now := time.monotonic()) < began_at + seconds:
        worst = max(worst, pulse.silent_s(sock, now))
        if until_silent_s is not None and worst >= until_silent_s:
            break
        time.sleep(0.02)
    info = kernel.tcp_info(sock)
    assert info is not None
    return worst, time.monotonic() - began_at, info.verdict()


@pytest.mark.netns
def test_a_paused_reader_is_never_silent_for_long(link: netns.Network) -> None:
    with _far_pair(link, 2.0) as (near, _):
        _fill(near)
        worst, _, verdict = _watch(near, 6.0)
    assert verdict == "paused"
    # A probe may stay unanswered (tcp_invalid_ratelimit); the next one comes within a second.
    assert worst < 1.5


@pytest.mark.netns
def test_a_paused_reader_that_dies_is_found(link: netns.Network) -> None:
    with _far_pair(link, 2.0) as (near, _):
        _fill(near)
        link.drop()
        worst, took_s, verdict = _watch(near, 12.0, until_silent_s=2.0)
    assert worst >= 2.0
    assert took_s < 6.0
    assert verdict in ("dead", "paused")  # one look sees only as many probes as were sent meanwhile


@pytest.mark.netns
def test_a_dead_peer_with_data_in_flight_is_found(link: netns.Network) -> None:
    with _far_pair(link, 1.5) as (near, far):
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        link.drop()
        near.sendall(b"y" * 1000)
        worst, took_s, verdict = _watch(near, 8.0, until_silent_s=1.5)
        # One look counts retransmissions, and these come when the round trip measured before says: the third is sent
        # between 1.4 and 1.8 s after the data, or a little later on a busy machine.
        verdicts = {verdict}
        end = time.monotonic() + 6
        while "dead" not in verdicts and time.monotonic() < end:
            time.sleep(0.02)
            info = kernel.tcp_info(near)
            assert info is not None
            verdicts.add(info.verdict())
    assert worst >= 1.5
    assert took_s < 2.5
    assert "dead" in verdicts
    assert verdicts <= {"dead", "slow_network"}


@pytest.mark.netns
def test_an_idle_dead_peer_is_found_by_the_kernels_probes(link: netns.Network) -> None:
    with _far_pair(link, 2.0) as (near, far):
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        # Octets whose acknowledgement is lost are sent again for many minutes, and no probe is sent meanwhile.
        harness.wait_until(lambda: not kernel.unacknowledged_bytes(near))
        link.drop()
        poller = select.poll()
        poller.register(near, 0)
        began_at = time.monotonic()
        assert poller.poll(9000), "no error within 9 s"
        assert 3 < time.monotonic() - began_at < 8  # later than PeerPulse would say so
        info = kernel.tcp_info(near)
        assert info is not None
        assert (info.state, info.verdict()) == ("CLOSED", "dead")
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 110


@pytest.mark.netns
def test_a_slow_and_lossy_network_is_not_dead(link: netns.Network) -> None:
    link.slow(rate=100_000, delay_s=0.25, loss=0.05)
    with _far_pair(link, 2.0) as (near, far):
        seen: set[str] = set()
        reader = threading.Thread(target=peers.Wire(far).await_end)
        reader.start()
        pulse = kernel.PeerPulse()
        near.setblocking(False)
        until = time.monotonic() + 4
        while (now := time.monotonic()) < until:
            with contextlib.suppress(BlockingIOError):  # slower than we write
                near.send(bytes(65536))
            assert pulse.silent_s(near, now) < 1.9
            info = kernel.tcp_info(near)
            assert info is not None
            seen.add(info.verdict())
            time.sleep(0.02)
        link.restore()
        peers.Wire(near).reset()
        reader.join(5)
    assert "slow_network" in seen
    assert not seen & {"dead", "paused"}


# -- options ----------------------------------------------------------------------------------------------------------

_KEEPALIVE = [
    (60.0, (15, 6, 14)),
    (20.0, (5, 2, 14)),
    (4.0, (1, 1, 6)),
    (1.0, (1, 1, 3)),
    (0.2, (1, 1, 2)),
    (2_147_483.0, (32767, 32767, 83)),
]


@pytest.mark.parametrize(("dead_s", "expected"), _KEEPALIVE)
def test_accepted_and_connected_sockets_have_the_options(dead_s: float, expected: tuple[int, int, int]) -> None:
    with socket.socket() as listener, socket.socket() as client:
        kernel.prepare_listener(listener, dead_s, 12.5)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        kernel.prepare_socket(client, dead_s, 12.5)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            for sock in (client, accepted):
                tcp = socket.IPPROTO_TCP
                names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                assert tuple(sock.getsockopt(tcp, name) for name in names) == expected
                assert sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 12500
                assert sock.getsockopt(tcp, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                with contextlib.suppress(OSError):  # before Linux 6.15
                    longest_ms = sock.getsockopt(tcp, 44)
                    asked_for_ms = min(max(1000, int(dead_s * 1000 / 6)), 120_000)
                    assert asked_for_ms <= longest_ms < asked_for_ms + 10  # in jiffies


def test_without_limits_the_systems_keepalive_holds_and_no_user_timeout() -> None:
    with socket.socket() as plain, socket.socket() as sock:
        kernel.prepare_socket(sock, None, None)
        for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT):
            assert sock.getsockopt(socket.IPPROTO_TCP, name) == plain.getsockopt(socket.IPPROTO_TCP, name)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_unix_sockets_are_left_alone() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        kernel.prepare_socket(sock, 60.0, 5.0)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_reset_on_close() -> None:
    with _pair() as (near, far):
        kernel.reset_on_close(near)
        near.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)


# -- splice -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe() -> collections.abc.Iterator[kernel.SplicePipe]:
    if not kernel.HAVE_SPLICE:
        pytest.skip("no splice on this system")
    pipe = kernel.SplicePipe()
    yield pipe
    pipe.close()


def test_splice_moves_all_octets_in_order(pipe: kernel.SplicePipe) -> None:
    octets = os.urandom(3_000_000)
    with _pair() as (sender, source), _pair() as (sink, receiver):
        received = bytearray()

        def receive() -> None:
            while part := receiver.recv(65536):
                received.extend(part)

        threads = [threading.Thread(target=receive), threading.Thread(target=sender.sendall, args=(octets,))]
        for thread in threads:
            thread.start()
        source.setblocking(False)
        sink.setblocking(False)
        moved = 0
        while moved < len(octets):
            with contextlib.suppress(BlockingIOError):  # the sender is slower
                pipe.fill(source.fileno(), len(octets) - moved)
            while pipe.held:
                with contextlib.suppress(BlockingIOError):  # the receiver is slower
                    moved += pipe.drain(sink.fileno())
        threads[1].join(5)  # or close waits for the other thread's call to return
        sender.close()
        assert select.select([source], [], [], 2)[0]
        assert pipe.fill(source.fileno(), 100) == 0
        sink.close()
        for thread in threads:
            thread.join(5)
    assert bytes(received) == octets


def test_splice_never_waits(pipe: kernel.SplicePipe) -> None:
    with _pair() as (sender, source), _pair() as (sink, _):
        source.setblocking(False)
        with pytest.raises(BlockingIOError):
            pipe.fill(source.fileno(), 100)
        assert pipe.held == 0
        sender.sendall(b"x" * 1000)
        assert select.select([source], [], [], 2)[0]
        assert pipe.fill(source.fileno(), 400) == 400
        _fill(sink)
        with pytest.raises(BlockingIOError):
            pipe.drain(sink.fileno())
        assert pipe.held == 400


def test_splice_from_a_reset_socket_says_so(pipe: kernel.SplicePipe) -> None:
    with _pair() as (sender, source):
        peers.Wire(sender).reset()
        source.setblocking(False)
        assert select.select([source], [], [], 2)[0]
        with pytest.raises(ConnectionResetError):
            pipe.fill(source.fileno(), 100)


def test_a_pipe_too_many_is_an_error_and_leaves_nothing_open() -> None:
    if not kernel.HAVE_SPLICE:
        pytest.skip("no splice on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/dev/null", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            kernel.SplicePipe()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pipe_that_may_not_grow_stays_small() -> None:
    if os.geteuid() or not kernel.HAVE_SPLICE:
        pytest.skip("needs root, to become a user whose pipe pages can run out")
    program = (
        "import fcntl, os\nfrom proxy.kernel import SplicePipe\nos.setuid(65534)\n"
        "pipes = [SplicePipe() for _ in range(400)]\n"
        "print(sorted({fcntl.fcntl(pipe._write_fd, fcntl.F_GETPIPE_SZ) for pipe in pipes}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(__file__) + "/..",
    )
    assert done.returncode == 0, done.stderr
    sizes = [int(size) for size in done.stdout.strip("[]\n").split(",")]
    assert sizes[-1] == 1024 * 1024
    assert sizes[0] < sizes[-1]  # pipe-user-pages-soft has run out


# -- processes --------------------------------------------------------------------------------------------------------


def test_file_limit_and_core() -> None:
    program = (
        "import os, resource\nfrom proxy.kernel import pin_to_core, raise_file_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))\n"
        "assert raise_file_limit() == (100, hard)\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard\n"
        "cores = sorted(os.sched_getaffinity(0))\n"
        "assert pin_to_core(len(cores) + 0) == cores[0]\n"
        "assert os.sched_getaffinity(0) == {cores[0]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=os.path.dirname(__file__) + "/..",
    )
    assert done.returncode == 0, done.stderr


def test_tcp_info_is_read_at_the_right_places() -> None:
    """The offsets, against a second way of reading them: the names of linux/tcp.h with their offsets."""
    with _pair() as (near, far):
        near.sendall(b"x" * 5000)
        assert far.recv(5000, socket.MSG_WAITALL)
        octets = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
        info = kernel.tcp_info(near)
    assert info is not None
    offsets = {
        "rtt_s": ("I", 68, 1e6),
        "bytes_acked": ("Q", 120, 1),
        "segments_received": ("I", 140, 1),
        "snd_wnd": ("I", 228, 1),
    }
    for name, (kind, at, scale) in offsets.items():
        assert getattr(info, name) == struct.unpack_from("=" + kind, octets, at)[0] / scale
