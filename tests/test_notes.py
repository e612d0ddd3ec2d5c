"""What a configuration may say and is still worth a look: ``check`` prints it, ``serve`` logs it."""

import datetime
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import harness
from harness import ProxyProcess
from peers import Upstream, silent

PATIENCE_S = 20.0


def notes(*options: str, prefix: tuple[str, ...] = ()) -> list[str]:
    """Returns: what ``check`` notes, with so few connections that no machine has too few files for them."""
    connections = () if "--max-connections" in options else ("--max-connections", "100")
    command = [*prefix, sys.executable, "-m", "proxy", "check", "--json", *options, *connections]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)["notes"]
    assert isinstance(found, list)
    return found


@pytest.fixture
def daemon(tmp_path: pathlib.Path) -> str:
    """The URL of a unix socket that somebody listens on."""
    path = tmp_path / "daemon.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
    path.chmod(0o660)
    return f"unix://{path}"


@pytest.mark.parametrize("listen", ["127.0.0.1:2375", "127.9.9.9:1", "[::1]:2375", "localhost:2375"])
def test_a_daemon_on_loopback_is_nothing_to_note(listen: str, daemon: str) -> None:
    assert notes("--listen", listen, "--upstream", daemon) == []


@pytest.mark.parametrize("listen", ["0.0.0.0:2375", "[::]:2375"])
def test_a_daemon_for_everybody_is_noted_unless_certificates_are_asked_for(
    listen: str, daemon: str, tmp_path: pathlib.Path
) -> None:
    (note,) = notes("--listen", listen, "--upstream", daemon)
    assert note.startswith("whoever reaches ")
    assert f"has all that {daemon} offers" in note
    assert note.endswith("listen on 127.0.0.1 or a unix socket, or ask for certificates with tls_client_ca")
    authority = trustme.CA()
    ca, cert = tmp_path / "ca.pem", tmp_path / "cert.pem"
    authority.cert_pem.write_to_path(str(ca))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(cert))
    cert.chmod(0o600)
    tls = ("--tls-cert", str(cert))
    assert notes("--listen", listen, "--upstream", daemon, *tls) == [note]
    assert notes("--listen", listen, "--upstream", daemon, *tls, "--tls-client-ca", str(ca)) == []
    assert notes("--listen", listen, "--upstream", "http://127.0.0.1:80") == []


def test_an_upstream_socket_that_can_not_be_used_now(tmp_path: pathlib.Path) -> None:
    assert notes("--upstream", f"unix://{tmp_path}/none") == [
        f"upstream socket '{tmp_path}/none' does not exist now; requests get 502 until it does"
    ]
    (tmp_path / "file").touch()
    assert notes("--upstream", f"unix://{tmp_path}/file") == [
        f"upstream socket '{tmp_path}/file' is no socket; requests get 502 until one is there"
    ]
    (tmp_path / "circle").symlink_to("circle")
    (note,) = notes("--upstream", f"unix://{tmp_path}/circle")
    assert "can't be looked at (Too many levels of symbolic links)" in note


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_an_upstream_socket_of_others() -> None:
    # Below a directory that the other user may enter, which pytest's own is not.
    path = f"/tmp/abort-proxy-notes-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        try:
            os.chmod(path, 0o660)
            code = (
                "import os, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
                "from proxy.config import load_settings\nfrom proxy.notes import configuration_notes\n"
                "print(*configuration_notes(load_settings(['--upstream', sys.argv[1]], {}), {}))"
            )
            # Imported before the user changes: it may not be able to read the package.
            code = "import proxy.config, proxy.notes\n" + code
            done = subprocess.run(
                [sys.executable, "-c", code, f"unix://{path}"],
                cwd=harness.ROOT,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=True,
            )
        finally:
            os.unlink(path)
    assert done.stdout == (
        f"upstream socket {path!r} may not be written by this user; requests get 502 while that is so: run as its owner"
        " or in its group (docker's is docker)\n"
    )


def test_fewer_files_than_connections_need() -> None:
    upstream = ("--upstream", "http://127.0.0.1:80", "--workers", "2")
    few = ("prlimit", "--nofile=2000:2000")
    (note,) = notes(*upstream, "--max-connections", "4096", prefix=few)
    assert note == (
        "max_connections (4,096, set by flag) takes 4,160 open files in each worker, and 2,000 are allowed (ulimit"
        " -Hn); beyond them requests get 503"
    )
    assert notes(*upstream, "--max-connections", "1800", prefix=few) == []


@pytest.mark.parametrize("pair", ["client-read", "client-write", "upstream-write", "upstream-read"])
def test_a_timeout_that_its_deadline_leaves_no_room(pair: str) -> None:
    upstream = ("--upstream", "http://127.0.0.1:80")
    (note,) = notes(*upstream, f"--{pair}-timeout", "20", f"--{pair}-deadline", "10")
    name = pair.replace("-", "_")
    assert note == (
        f"{name}_timeout (20 s, set by flag) never ends anything, as {name}_deadline (10 s, set by flag) does so"
        " before it"
    )
    for less in ("5", "10"):  # of a tie the timeout is told
        assert notes(*upstream, f"--{pair}-timeout", less, f"--{pair}-deadline", "10") == []


def test_a_peer_that_is_given_up_too_soon() -> None:
    upstream = ("--upstream", "http://127.0.0.1:80")
    (note,) = notes(*upstream, "--peer-dead-timeout", "1")
    assert note == (
        "peer_dead_timeout (1 s, set by flag) may give up a peer that is only slow to answer; 1.5 s is long enough for"
        " most"
    )
    assert notes(*upstream, "--peer-dead-timeout", "1.5") == []
    assert notes(*upstream, "--peer-dead-timeout", "none") == []


def test_serve_logs_them_and_looks_at_certificates_again(tmp_path: pathlib.Path) -> None:
    identity = trustme.CA().issue_cert("127.0.0.1")
    cert = tmp_path / "cert.pem"
    identity.private_key_and_cert_chain_pem.write_to_path(str(cert))
    cert.chmod(0o600)
    options = ("--tls-cert", str(cert), "--client-read-timeout", "9", "--client-read-deadline", "8")
    with Upstream(silent) as upstream, ProxyProcess(upstream.url, *options) as proxy:
        note = proxy.wait_for(lambda record: record["event"] == "server.note")
        assert note["level"] == "warning"
        assert "client_read_timeout (9 s, set by flag) never ends anything" in note["message"]
        cert.chmod(0o644)
        proxy.send_signal(signal.SIGHUP)
        note = proxy.wait_for(lambda record: record["event"] == "server.note" and "key" in record["message"])
        assert note["message"] == f"the key in {str(cert)!r} can be read by every user; chmod o-r mends it"


# -- certificates that are good for one purpose, and whose time is over -----------------------------------------------

_PURPOSES = {
    "any": None,
    "client": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "server": [ExtendedKeyUsageOID.SERVER_AUTH],
    "both": [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
}
_DAY = datetime.timedelta(days=1)


def _identity(path: pathlib.Path, purpose: str, first_day: int, last_day: int) -> str:
    """Write a certificate and its key. ``first_day`` and ``last_day`` count from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + first_day * _DAY)
        .not_valid_after(now + last_day * _DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if (usages := _PURPOSES[purpose]) is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    plain = serialization.NoEncryption()
    octets = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(octets + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize(
    ("option", "purpose"),
    [
        ("upstream-cert", "client"),
        ("upstream-cert", "both"),
        ("upstream-cert", "any"),
        ("tls-cert", "server"),
        ("tls-cert", "both"),
    ],
)
@pytest.mark.parametrize(
    ("first_day", "last_day", "said"),
    [(-3, -2, "certificate has expired"), (2, 3, "certificate is not yet valid"), (-3, 3, None)],
    ids=["expired", "not_yet", "good"],
)
def test_a_certificate_that_is_not_valid_now_is_noted_whatever_it_is_good_for(
    option: str, purpose: str, first_day: int, last_day: int, said: str | None, tmp_path: pathlib.Path
) -> None:
    cert = _identity(tmp_path / "cert.pem", purpose, first_day, last_day)
    upstream = ("--upstream", "https://localhost:1", "--upstream-ca", cert)
    name = option.replace("-", "_")
    assert notes(*upstream, f"--{option}", cert) == (
        [] if said is None else [f"{name} {cert!r}: {said}; peers that check it will refuse it"]
    )


@pytest.mark.parametrize("days", [(-3, -2), (2, 3), (-3, 3)], ids=["expired", "not_yet", "good"])
@pytest.mark.parametrize(("option", "purpose"), [("upstream-cert", "server"), ("tls-cert", "client")])
def test_a_certificate_for_another_purpose_is_noted_whatever_its_time(
    option: str, purpose: str, days: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    cert = _identity(tmp_path / "cert.pem", purpose, *days)
    (note,) = notes("--upstream", "https://localhost:1", "--upstream-ca", cert, f"--{option}", cert)
    # OpenSSL 1.1 says unsupported, 3 unsuitable.
    said = r"uns\w+ certificate purpose; peers that check it will refuse it"
    assert re.fullmatch(f"{option.replace('-', '_')} {re.escape(repr(cert))}: {said}", note)


def test_serve_logs_that_the_certificate_for_upstream_has_expired(tmp_path: pathlib.Path) -> None:
    cert = _identity(tmp_path / "cert.pem", "client", -3, -2)
    with ProxyProcess("https://localhost:1", "--upstream-ca", cert, "--upstream-cert", cert) as proxy:
        note = proxy.wait_for(lambda record: record["event"] == "server.note")
        assert note["level"] == "warning"
        assert note["message"].startswith(f"upstream_cert {cert!r}: certificate has expired")
