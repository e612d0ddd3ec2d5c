"""``dist/proxy.pyz``: that it brings all it needs, the certificates of certifi included, and is the same each time.

That it does what the package does is tested with the command line and the scenarios.
"""

import hashlib
import pathlib
import signal
import subprocess
import sys
import zipfile

import harness
import peers
from conftest import Certificates


def test_it_holds_the_package_as_it_is_and_nothing_compiled(archive: pathlib.Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        for path in (harness.ROOT / "proxy").glob("*.py"):
            assert opened.read(f"proxy/{path.name}") == path.read_bytes(), path.name
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
    assert {name.split("/")[0] for name in names} >= {"__main__.py", "proxy", "urllib3", "certifi", "pythonjsonlogger"}


def test_it_needs_no_package_of_the_machine(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(archive), "--version"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["file"].startswith(str(archive))
    assert set(lines) >= {"urllib3", "certifi", "python-json-logger"}


def test_it_checks_upstreams_by_the_certificates_inside_of_it(
    archive: pathlib.Path, certificates: Certificates, tmp_path: pathlib.Path
) -> None:
    """The CA of the upstream is none that certifi knows, so the handshake fails for this reason and no other."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with peers.Upstream(peers.answer_all(peers.ok()), "tls", tls=certificates.server_context()) as upstream:
        with harness.ProxyProcess(upstream.url, form="pyz", env={"TMPDIR": str(temporary)}) as proxy:
            for again in (False, True):
                if again:
                    proxy.send_signal(signal.SIGHUP)
                    reload = proxy.wait_for(lambda event: event["event"] == "server.reload")
                    assert reload["level"] == "info", reload
                with peers.connect(proxy.address) as client:
                    client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    assert client.read_response().status == 502
                record = proxy.next_request()
                assert (record["side"], record["phase"], record["cause"]) == ("upstream", "tls_handshake", "tls")
                assert "unable to get local issuer certificate" in record["exception"]["text"]
    assert not list(temporary.iterdir()), "files taken out of the archive are left"


def test_it_is_the_same_each_time(archive: pathlib.Path) -> None:
    def digest() -> str:
        return hashlib.sha256(archive.read_bytes()).hexdigest()

    before = digest()
    subprocess.run([str(harness.ROOT / "scripts" / "bundle")], check=True, capture_output=True, timeout=120)
    assert digest() == before
