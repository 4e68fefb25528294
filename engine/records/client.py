"""The nodes' side of the record server. Blocking, for worker threads; every call ends within its deadline.

A server that is away, slow, or talks nonsense raises RecordError, as a disk that is away does for a file. A change
whose answer was lost is the same change when it is asked for once more: it keeps its name, so it is no conflict with
itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from engine.address import Address
from engine.errors import (
    AuthenticationError,
    EngineError,
    ProtocolError,
    RecordConflictError,
    RecordError,
    RecordMissingError,
)
from engine.record import VolumeRecord
from engine.records import channel, messages
from engine.records.channel import Channel
from engine.records.messages import (
    Announce,
    Answer,
    CreateRecord,
    DeleteRecord,
    Lease,
    ListPresences,
    ListRecords,
    Presence,
    ReadLease,
    ReadMark,
    ReadRecord,
    Request,
    SetMark,
    SwapLease,
    SwapRecord,
)

CALL_TIMEOUT = 3.0
ORPHANED = "orphaned"
"""Cause of a lease that was released for a holder that died."""


class RecordsClient:
    """One connection, made when it is needed and again after a failure; calls of several threads take turns."""

    def __init__(self, address: str, secret: bytes, timeout: float = CALL_TIMEOUT) -> None:
        """`address` is `tcp:host:port`. Raises AddressError."""
        self.address = address
        self._target = Address.parse(address)
        self._secret = secret
        self._timeout = timeout
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._channel: Channel | None = None
        self._attempts: dict[type[Request], tuple[object, str]] = {}

    def __enter__(self) -> RecordsClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._hang_up()

    @property
    def local_host(self) -> str:
        """The address by which the server knows this node; empty while there is no connection."""
        with self._lock, contextlib.suppress(OSError):
            return str(self._socket.getsockname()[0]) if self._socket is not None else ""
        return ""

    def another(self) -> RecordsClient:
        """A client of the same server with a connection of its own, for whoever waits long."""
        return RecordsClient(self.address, self._secret, self._timeout)

    # records

    def read_record(self, volume: str) -> VolumeRecord:
        """Raises RecordMissingError, RecordError."""
        return self._call(ReadRecord(volume=volume)).records[0]

    def swap_record(self, expected: int, record: VolumeRecord) -> None:
        """Raises RecordConflictError, RecordError."""
        with self._attempt(SwapRecord, (expected, record)) as attempt:
            self._change(SwapRecord(expected=expected, record=record, attempt=attempt), expected, record.volume)

    def create_record(self, record: VolumeRecord) -> None:
        """Raises RecordError."""
        self._call(CreateRecord(record=record))

    def delete_record(self, volume: str, expected: int) -> None:
        """Raises RecordConflictError, RecordError."""
        self._change(DeleteRecord(volume=volume, expected=expected), expected, volume)

    def list_records(self) -> tuple[VolumeRecord, ...]:
        """Raises RecordError."""
        return self._call(ListRecords()).records

    # leases

    def read_lease(self, volume: str, unless: str = "", patience: float = 0.0) -> tuple[Lease, str]:
        """The lease and its version; with `patience`, in seconds, when that is another than `unless`, at the latest
        then. Raises RecordError."""
        answer = self._call(ReadLease(volume=volume, unless=unless, patience=patience), patience)
        return answer.lease or Lease(), answer.version

    def swap_lease(self, volume: str, expected: str, lease: Lease) -> tuple[bool, Lease, str]:
        """Whether it was `expected` and is `lease` now, and how it is, with its version. Raises RecordError."""
        with self._attempt(SwapLease, (volume, expected, lease)) as attempt:
            answer = self._exchange(SwapLease(volume=volume, expected=expected, lease=lease, attempt=attempt))
        if answer.status not in ("ok", "conflict"):
            raise self._refused(answer, volume)
        return answer.status == "ok", answer.lease or Lease(), answer.version

    # who is there

    def announce(self, volume: str, presence: Presence) -> None:
        """Raises RecordError."""
        self._call(Announce(volume=volume, presence=presence))

    def presences(self, volume: str) -> tuple[Presence, ...]:
        """Raises RecordError."""
        return self._call(ListPresences(volume=volume)).presences

    # marks

    def set_mark(self, volume: str, name: str, text: str | None) -> None:
        """Raises RecordError."""
        self._call(SetMark(volume=volume, name=name, text=text))

    def read_mark(self, volume: str, name: str) -> str | None:
        """Raises RecordError."""
        return self._call(ReadMark(volume=volume, name=name)).mark

    # the wire

    @contextlib.contextmanager
    def _attempt(self, kind: type[Request], change: object) -> Iterator[str]:
        """A name for this change: that of the last time, when that was the same and has had no answer."""
        known = self._attempts.get(kind)
        attempt = known[1] if known is not None and known[0] == change else os.urandom(12).hex()
        self._attempts[kind] = change, attempt
        yield attempt
        self._attempts.pop(kind, None)

    def _call(self, request: Request, patience: float = 0.0) -> Answer:
        answer = self._exchange(request, patience)
        if answer.status != "ok":
            raise self._refused(answer, getattr(request, "volume", ""))
        return answer

    def _change(self, request: Request, expected: int, volume: str) -> None:
        answer = self._exchange(request)
        if answer.status == "conflict":
            raise RecordConflictError(expected, answer.found)
        if answer.status != "ok":
            raise self._refused(answer, volume)

    def _refused(self, answer: Answer, volume: str) -> RecordError:
        if answer.status == "missing":
            return RecordMissingError(Path(f"{self.address}/{volume}"))
        return RecordError(answer.reason or f"the record server {self.address} answers {answer.status!r}")

    def _exchange(self, request: Request, patience: float = 0.0) -> Answer:
        with self._lock:
            fresh = self._socket is None
            try:
                return self._ask(request, patience)
            except (OSError, EngineError) as error:
                self._hang_up()
                if fresh or isinstance(error, TimeoutError):
                    raise self._away(error) from error
            # the server, or the network's memory of an idle connection, may have gone since the last call
            try:
                return self._ask(request, patience)
            except (OSError, EngineError) as error:
                self._hang_up()
                raise self._away(error) from error

    def _away(self, error: Exception) -> RecordError:
        if isinstance(error, TimeoutError):
            return RecordError(f"the record server {self.address} does not answer within {self._timeout:g} s")
        if isinstance(error, OSError):
            return RecordError(f"the record server {self.address} is away: {error.strerror or error}")
        return RecordError(f"the record server {self.address}: {error}")

    def _ask(self, request: Request, patience: float) -> Answer:
        """Raises OSError, EngineError."""
        end = time.monotonic() + self._timeout
        if self._socket is None:
            self._connect(end)
        assert self._socket is not None
        assert self._channel is not None
        end += patience
        self._send(self._channel.seal(messages.encode(request)), end)
        proof, body = self._receive(end)
        self._channel.check(proof, body)
        return messages.decode(body, Answer)

    def _connect(self, end: float) -> None:
        sock = socket.socket(self._target.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket = sock
        sock.settimeout(_left(end))
        sock.connect(self._target.target)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = channel.new_hello()
        self._send(channel.plain(messages.encode(hello)), end)
        server = channel.read_hello(self._receive(end)[1])
        if not hello.version_min <= server.version_max <= hello.version_max:
            raise ProtocolError(f"the server chose version {server.version_max}")
        self._channel = Channel(self._secret, "client", hello, server)

    def _send(self, data: bytes, end: float) -> None:
        assert self._socket is not None
        self._socket.settimeout(_left(end))
        self._socket.sendall(data)

    def _receive(self, end: float) -> tuple[bytes, bytes]:
        length, proof = channel.split_prefix(self._exactly(channel.PREFIX_SIZE, end))
        return proof, self._exactly(length, end)

    def _exactly(self, size: int, end: float) -> bytes:
        assert self._socket is not None
        buffer = bytearray()
        while len(buffer) < size:
            self._socket.settimeout(_left(end))
            chunk = self._socket.recv(min(size - len(buffer), 1 << 20))
            if not chunk:
                if self._channel is not None and not buffer:
                    raise AuthenticationError("it hung up: is this the secret of these records?")
                raise ProtocolError("it hung up in the middle of a message")
            buffer += chunk
        return bytes(buffer)

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self._channel = None


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def release_lease(client: RecordsClient, volume: str, instance: str) -> bool:
    """On behalf of a holder that died, and of which nothing is left; whether the lease was its own still.

    Raises RecordError.
    """
    lease, version = client.read_lease(volume)
    while lease.instance == instance and lease.phase != "released":
        released = msgspec.structs.replace(lease.renewed(), phase="released", cause=ORPHANED)
        done, lease, version = client.swap_lease(volume, version, released)
        if done:
            return True
    return False


class RemoteRecordStore:
    """`engine.record.RecordStore` of one volume, kept by a record server."""

    def __init__(self, client: RecordsClient, volume: str) -> None:
        self._client = client
        self._volume = volume

    def read(self) -> VolumeRecord:
        return self._client.read_record(self._volume)

    def swap(self, expected_version: int, new: VolumeRecord) -> None:
        # Whoever is heard by the server and does not hear it must change nothing: it would remove the replicas that it
        # does not hear either, and the node with these could not take over from it.
        self._client.read_record(self._volume)
        self._client.swap_record(expected_version, new)
