"""How messages travel between a node and the record server; pure functions and one small state.

    client                                    server
    hello  versions, nonce_c         ->
                                     <-       hello  version, nonce_s
    request 1, with its proof        ->       checks it before it reads the request
                                     <-       answer 1, with its proof

A message is a length (u32, little-endian), 32 bytes of proof and a body. The proof is HMAC-SHA-256 over the direction,
the number of the message in that direction and the body, under a key that both sides derive from the secret and the
two hellos. So a peer without the secret can neither ask nor answer, nor change or repeat what others say. Hellos have
a proof of zeros.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Literal

from engine.errors import AuthenticationError, ProtocolError, VersionError
from engine.records.messages import VERSION_MAX, VERSION_MIN, Hello, decode, encode

NONCE_SIZE = 32
MAX_BODY = 4 << 20
_LENGTH = struct.Struct("<I")
PROOF_SIZE = 32
PREFIX_SIZE = _LENGTH.size + PROOF_SIZE

Role = Literal["client", "server"]


def new_hello(version_min: int = VERSION_MIN, version_max: int = VERSION_MAX) -> Hello:
    return Hello(version_min=version_min, version_max=version_max, nonce=os.urandom(NONCE_SIZE))


def answer_hello(hello: Hello) -> Hello:
    """With the highest version that both sides speak. Raises VersionError."""
    chosen = min(hello.version_max, VERSION_MAX)
    if chosen < max(hello.version_min, VERSION_MIN):
        raise VersionError((VERSION_MIN, VERSION_MAX), (hello.version_min, hello.version_max))
    return new_hello(chosen, chosen)


def plain(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + bytes(PROOF_SIZE) + body


def split_prefix(prefix: bytes) -> tuple[int, bytes]:
    """Length of the body, and the proof. Raises ProtocolError."""
    (length,) = _LENGTH.unpack_from(prefix)
    if length > MAX_BODY:
        raise ProtocolError(f"a message of {length} bytes")
    return length, prefix[_LENGTH.size :]


def read_hello(body: bytes) -> Hello:
    """Raises ProtocolError."""
    hello = decode(body, Hello)
    if len(hello.nonce) != NONCE_SIZE:
        raise ProtocolError(f"a nonce of {len(hello.nonce)} bytes")
    return hello


class Channel:
    """One side of a connection after the hellos."""

    def __init__(self, secret: bytes, role: Role, client: Hello, server: Hello) -> None:
        said = b"share-manager records" + encode(client) + encode(server)
        self._key = hmac.new(secret, said, hashlib.sha256).digest()
        self._role: Role = role
        self._peer: Role = "server" if role == "client" else "client"
        self._sent = 0
        self._received = 0

    def seal(self, body: bytes) -> bytes:
        """The next message to send."""
        self._sent += 1
        return _LENGTH.pack(len(body)) + self._proof(self._role, self._sent, body) + body

    def check(self, proof: bytes, body: bytes) -> None:
        """The next one received. Raises AuthenticationError."""
        self._received += 1
        if not hmac.compare_digest(proof, self._proof(self._peer, self._received, body)):
            raise AuthenticationError(f"the {self._peer} does not know the secret of these records")

    def _proof(self, role: Role, number: int, body: bytes) -> bytes:
        return hmac.new(self._key, role.encode() + struct.pack("<Q", number) + body, hashlib.sha256).digest()
