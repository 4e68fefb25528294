"""Mutual proof of the volume's secret, before anything else is said; pure functions.

    client                                   replica
    HELLO  versions, nonce_c        ->
                                    <-       HELLO reply: version, nonce_s
    AUTH   HMAC(k, "client"...)     ->
                                    <-       AUTH reply: HMAC(k, "replica"...), name, instance

The client proves itself first, so a peer without the key learns a version number and a random one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct

from engine.errors import AuthenticationError, VersionError
from engine.wire.messages import VERSION_MAX, VERSION_MIN, Hello

NONCE_SIZE = 32


def new_nonce() -> bytes:
    return os.urandom(NONCE_SIZE)


def proof(key: bytes, role: str, version: int, client_nonce: bytes, replica_nonce: bytes) -> bytes:
    body = role.encode() + struct.pack("<H", version) + client_nonce + replica_nonce
    return hmac.new(key, body, hashlib.sha256).digest()


def check_proof(given: bytes, expected: bytes, who: str) -> None:
    if not hmac.compare_digest(given, expected):
        raise AuthenticationError(f"{who} does not know this volume's secret")


def choose_version(hello: Hello, version_min: int = VERSION_MIN, version_max: int = VERSION_MAX) -> int:
    """The highest version that both sides speak. Raises VersionError."""
    chosen = min(hello.version_max, version_max)
    if chosen < max(hello.version_min, version_min):
        raise VersionError((version_min, version_max), (hello.version_min, hello.version_max))
    return chosen
