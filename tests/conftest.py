"""Fixtures for all tests: certificates, the forms of the program, and the count of threads and open files."""

import collections.abc
import dataclasses
import datetime
import os
import pathlib
import signal
import ssl
import subprocess
import sys
import threading
import time

import hypothesis
import pytest
import trustme

import harness
from proxy.log import EventLog

_LEAK_PATIENCE_S = 2.0
_LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers, and let Ctrl-C through."""
    # Whoever starts the tests in the background may have it ignored, which docker and others would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # On a busy machine any example may take long.
    hypothesis.settings.register_profile(
        "busy machine",
        hypothesis.settings(),
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("busy machine")
    config.addinivalue_line("markers", "netns: needs root, for network namespaces")
    config.addinivalue_line("markers", "docker: needs a docker daemon")
    config.addinivalue_line("markers", "slow: takes more than some seconds")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped check must not read as passed: the run fails, and the summary has said why each was skipped."""
    if os.environ.get("CI") != "true":
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if skipped and session.exitstatus == pytest.ExitCode.OK:
        sys.stderr.write(f"\n{len(skipped)} tests were skipped, and CI skips nothing\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _resources() -> tuple[set[int], list[str]]:
    files = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            files.append(f"{fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue  # that of listdir itself
    return {thread.ident or 0 for thread in threading.enumerate()}, sorted(files)


@pytest.fixture(autouse=True)
def nothing_left() -> collections.abc.Iterator[None]:
    """Fail a test that leaves threads or open files behind in this process."""
    threads, files = _resources()
    yield
    until = time.monotonic() + _LEAK_PATIENCE_S
    while True:
        threads_now, files_now = _resources()
        left_threads = [str(t) for t in threading.enumerate() if t.ident in threads_now - threads]
        if not left_threads and len(files_now) <= len(files):
            return
        if time.monotonic() > until:
            break
        time.sleep(0.005)
    left_files = sorted(set(files_now) - set(files))
    pytest.fail(f"left behind: threads {left_threads}, files {left_files}")


@dataclasses.dataclass(frozen=True)
class Certificates:
    """Files and contexts of a throwaway CA; another CA issued what is called stranger."""

    directory: pathlib.Path
    ca: str
    server: str  # certificates, each with its key in the same file
    client: str
    stranger: str
    stranger_ca: str
    wrong_name: str
    expired: str

    def server_context(self, *, certificate: str | None = None, client_ca: str | None = None) -> ssl.SSLContext:
        """Returns: the context of an upstream that asks for a client certificate if ``client_ca`` is given."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate or self.server)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self, *, certificate: str | None = None, ca: str | None = None) -> ssl.SSLContext:
        """Returns: the context of a client that trusts the CA and shows a certificate if one is given."""
        context = ssl.create_default_context(cafile=ca or self.ca)
        if certificate is not None:
            context.load_cert_chain(certificate)
        return context


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A CA and what it issued."""
    directory = tmp_path_factory.mktemp("certificates")
    authority, other = trustme.CA(), trustme.CA()

    def write(name: str, *blobs: trustme.Blob) -> str:
        path = directory / name
        for blob in blobs:
            blob.write_to_path(str(path), append=True)
        path.chmod(0o600)  # of a key that others may read the proxy would take note
        return str(path)

    def issue(ca: trustme.CA, name: str, *identities: str) -> str:
        leaf = ca.issue_cert(*identities)
        return write(name, leaf.private_key_pem, *leaf.cert_chain_pems)

    server = authority.issue_cert("localhost", "127.0.0.1", "::1", "proxy.test")
    expired = authority.issue_cert("localhost", "127.0.0.1", not_after=_LONG_AGO)
    return Certificates(
        directory=directory,
        ca=write("ca.pem", authority.cert_pem),
        server=write("server.pem", server.private_key_pem, *server.cert_chain_pems),
        client=issue(authority, "client.pem", "client@test.example"),
        stranger=issue(other, "stranger.pem", "stranger@test.example"),
        stranger_ca=write("stranger-ca.pem", other.cert_pem),
        wrong_name=issue(authority, "wrong-name.pem", "elsewhere.test"),
        expired=write("expired.pem", expired.private_key_pem, *expired.cert_chain_pems),
    )


@pytest.fixture(scope="session")
def single_file() -> pathlib.Path:
    """The generated proxy.py."""
    if not harness.SINGLE_FILE.exists():
        pytest.skip("proxy.py has not been generated: scripts/amalgamate.py makes it")
    return harness.SINGLE_FILE


@pytest.fixture(scope="session")
def archive() -> pathlib.Path:
    """A fresh dist/proxy.pyz."""
    script = harness.ROOT / "scripts" / "bundle"
    if not script.exists():
        pytest.skip("scripts/bundle does not exist, so there is no dist/proxy.pyz")
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode or not harness.ARCHIVE.exists():
        pytest.skip(f"scripts/bundle failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return harness.ARCHIVE


@pytest.fixture(params=harness.FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each form of the program in turn."""
    name: str = request.param
    if name != "package":
        request.getfixturevalue("single_file" if name == "single_file" else "archive")
    return name


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> collections.abc.Iterator[EventLog]:
    """A log in this process; what it shares with others has no end but that of the process."""
    log = EventLog(str(tmp_path_factory.mktemp("log") / "log"), "info")
    yield log
    for fd in {log._file.fd, log._stderr.fd} - {2}:
        os.close(fd)
