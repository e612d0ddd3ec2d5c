"""Key updates of TLS 1.3, any number of them. Apart from ``peers``, which scripts use where no package is installed."""

import hashlib
import hmac
import pathlib
import ssl
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305


class KeyUpdates:
    """Makes records of TLS 1.3 that ask the other side for new keys (RFC 8446 §4.6.3): Python has no call for that.

    They are made from the secret that a context wrote down (``keylog_filename``), so whoever sent them can't write with
    its own TLS state any more.
    """

    def __init__(self, keylog: pathlib.Path, tls: ssl.SSLObject | ssl.SSLSocket, *, by: str, records: int) -> None:
        """``by`` is CLIENT or SERVER, which has sent so many ``records`` behind the handshake."""
        (line,) = [line for line in keylog.read_text().splitlines() if line.startswith(f"{by}_TRAFFIC_SECRET_0 ")]
        cipher = tls.cipher()
        assert cipher is not None
        name, version, bits = cipher
        assert version == "TLSv1.3"
        self._secret = bytes.fromhex(line.split()[2])
        self._hash = name.rpartition("_")[2].lower()
        self._key_size = bits // 8
        self._cipher: type[AESGCM | ChaCha20Poly1305] = ChaCha20Poly1305 if "CHACHA20" in name else AESGCM
        self._records = records

    def _expand(self, label: bytes, size: int) -> bytes:
        """Returns: HKDF-Expand-Label of the secret (RFC 8446 §7.1) without a context, of one block at most."""
        label = b"tls13 " + label
        info = struct.pack("!HB", size, len(label)) + label + b"\0\1"
        return hmac.digest(self._secret, info, self._hash)[:size]

    def make(self, count: int) -> bytes:
        """Returns: the next ``count`` records. Each is under the key that the one before it announced."""
        header = b"\x17\x03\x03\x00\x16"
        records = bytearray()
        for _ in range(count):
            nonce = int.from_bytes(self._expand(b"iv", 12), "big") ^ self._records
            cipher = self._cipher(self._expand(b"key", self._key_size))
            # KeyUpdate, one octet long: update_requested; then the content type, which is handshake.
            message = b"\x18\0\0\1\1" + b"\x16"
            records += header + cipher.encrypt(nonce.to_bytes(12, "big"), message, header)
            self._secret = self._expand(b"traffic upd", hashlib.new(self._hash).digest_size)
            self._records = 0
        return bytes(records)
