"""Certificates for trials: that they work the way the script says, and that it overwrites nothing unasked."""

import pathlib
import socket
import ssl
import stat
import subprocess

import pytest

import harness
import peers

FILES = {"ca.pem", "ca-key.pem", "server-cert.pem", "server-key.pem", "cert.pem", "key.pem"}


def make_certs(*arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(harness.ROOT / "scripts" / "make-certs"), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def strict_context(directory: pathlib.Path, *, identity: bool) -> ssl.SSLContext:
    """Returns: the context of a client as strict as Python 3.13 is by itself."""
    context = ssl.create_default_context(cafile=directory / "ca.pem")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if identity:
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    return context


def test_docker_style_names_and_modes(tmp_path: pathlib.Path) -> None:
    done = make_certs(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "certs").iterdir()}
    assert made == {name: 0o600 if name.endswith("key.pem") else 0o644 for name in FILES}


def test_both_sides_know_each_other(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "with space"
    assert make_certs("--host", "build.example", "--host=10.1.2.3", str(directory), cwd=tmp_path).returncode == 0
    with (
        peers.Upstream(peers.answer_all(peers.ok())) as upstream,
        harness.ProxyProcess(
            upstream.url,
            *("--tls-cert", str(directory / "server-cert.pem"), "--tls-key", str(directory / "server-key.pem")),
            *("--tls-client-ca", str(directory / "ca.pem")),
        ) as proxy,
    ):
        for name in ("localhost", "127.0.0.1", "::1", "build.example", "10.1.2.3"):
            with (
                socket.create_connection(("127.0.0.1", proxy.port), 5) as plain,
                strict_context(directory, identity=True).wrap_socket(plain, server_hostname=name) as client,
            ):
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert client.recv(65536).startswith(b"HTTP/1.1 200 "), name
        assert [record["event"] for record in proxy.wait_requests(5)] == ["request.complete"] * 5
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as plain:
            with pytest.raises(ssl.SSLCertVerificationError, match=r"elsewhere\.example"):
                strict_context(directory, identity=True).wrap_socket(plain, server_hostname="elsewhere.example")
        with (
            socket.create_connection(("127.0.0.1", proxy.port), 5) as plain,
            strict_context(directory, identity=False).wrap_socket(plain, server_hostname="localhost") as client,
        ):
            # In TLS 1.3 a client hears only with its first read that its certificate was missed.
            with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                client.recv(1)


def test_nothing_is_overwritten_unasked(tmp_path: pathlib.Path) -> None:
    (tmp_path / "key.pem").write_text("mine")
    refused = make_certs(str(tmp_path), cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"make-certs: {tmp_path}/key.pem is there already; --force replaces it\n"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]
    assert make_certs("--force", str(tmp_path), cwd=tmp_path).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "mine" not in (tmp_path / "key.pem").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--host"], "--host needs a name or an address"),
        (["--host", "a,DNS:b"], "--host 'a,DNS:b' is neither a name nor an address"),
        (["--hots", "a"], "unknown option --hots; there are --force and --host"),
        (["a", "b"], "more than one directory: a and b"),
    ],
)
def test_arguments_it_does_not_know(tmp_path: pathlib.Path, arguments: list[str], text: str) -> None:
    done = make_certs(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"make-certs: {text}\n")
    assert not list(tmp_path.iterdir())
