"""ganesha's log file, as events."""

import enum
import functools
import os
import re
import struct
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import msgspec

MAX_BYTES = 8 << 20
_LINE = re.compile(
    r"(?P<time>\d\d/\d\d/\d{4} \d\d:\d\d:\d\d) : epoch (?P<epoch>[0-9a-f]+) : \S* : \S+?-\d+\[(?P<thread>[^]]*)\] "
    r"(?P<function>\S+) :(?P<component>[^:]+) :(?P<level>[A-Z_]+) :(?P<message>.*)"
)
_LINE_MAX = 64 << 10
_READ = 1 << 20
_GRACE_SECONDS = re.compile(r"Now IN GRACE, duration (\d+)")
_FILESYSTEM = re.compile(r"Added filesystem \S+ (.*) namelen=\d+ dev=\S+ fsid=0x([0-9a-f]{16})\.0x([0-9a-f]{16}) ")
_RECLAIMED = re.compile(r"reclaim complete\((\d+)\) clid count\((\d+)\)")


class EventKind(enum.StrEnum):
    """What a line means to whoever supervises the server.

    CLIENT_RECOVERED and CLIENT_EXPIRED are written at log level DEBUG only; the client records tell the same.
    """

    INITIALIZED = "initialized"
    GRACE_STARTED = "grace-started"
    GRACE_ENDED = "grace-ended"
    RECLAIM_PROGRESS = "reclaim-progress"
    CLIENT_RECOVERED = "client-recovered"
    CLIENT_EXPIRED = "client-expired"
    RECORD_FAILED = "record-failed"
    BIND_FAILED = "bind-failed"
    EXPORT_FAILED = "export-failed"
    CONFIG_FAILED = "config-failed"
    STOPPING = "stopping"
    FATAL = "fatal"
    OTHER = "other"


_KINDS: tuple[tuple[EventKind, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (EventKind.INITIALIZED, r"NFS SERVER INITIALIZED"),
        (EventKind.GRACE_STARTED, r"NFS Server Now IN GRACE"),
        (EventKind.GRACE_ENDED, r"NFS Server Now NOT IN GRACE"),
        (EventKind.RECLAIM_PROGRESS, r"check grace:reclaim complete"),
        (EventKind.CLIENT_RECOVERED, r"Allowed to reclaim ClientId"),
        (EventKind.CLIENT_EXPIRED, r"Reaper done, expired|Expire index"),
        (EventKind.RECORD_FAILED, r"Failed to (create client|remove client|create v4|read v4|open) "),
        (EventKind.BIND_FAILED, r"Cannot bind|Error binding to|Unable to bind"),
        (EventKind.STOPPING, r"NFS EXIT: stopping"),
        (EventKind.CONFIG_FAILED, r"^Config File \(|[Ee]rror while parsing|syntax error"),
        (EventKind.EXPORT_FAILED, r"while resolving export path|Lookup failed on path, ExportId|could not to claim"),
    )
)
# Written at every start of a server that has no Kerberos keytab and no rpcbind, and needs neither.
_NOISE = re.compile(r"krb5|principal|Cannot register")
# The lines around the one that names the mistake.
_SUMMARY = re.compile(r"Error while parsing|\berrors\b|Errors processing")
# ganesha asks getaddrinfo(3) with AI_ADDRCONFIG even for numbers (measured).
_NO_NETWORK = " (this network namespace has no address of that family but loopback's own; bring up an interface)"
_BAD_LEVELS = frozenset({"FATAL", "MAJ", "CRIT"})


class LogEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log. `time` is in seconds since 1970, with the log's own resolution of a second.

    A line without ganesha's heading (a continuation, or output of a library) has an empty level and component.
    """

    time: float
    level: str = ""
    component: str = ""
    function: str = ""
    message: str
    kind: EventKind = EventKind.OTHER

    @property
    def grace_seconds(self) -> int | None:
        """How long a grace period that begins here may last."""
        match = _GRACE_SECONDS.search(self.message)
        return int(match[1]) if match else None

    @property
    def reclaimed(self) -> tuple[int, int] | None:
        """(clients that have finished their reclaim, clients that may reclaim), for RECLAIM_PROGRESS."""
        match = _RECLAIMED.search(self.message)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def filesystem(self) -> tuple[str, uuid.UUID] | None:
        """(mount point, UUID) of a filesystem that the server has found; written by the component FSAL at INFO.

        The UUID is made of the number that handles carry, and so is the filesystem's own only if blkid could tell it.
        """
        match = _FILESYSTEM.search(self.message)
        if match is None:
            return None
        # ganesha copies the 16 bytes into two 64-bit integers of the machine.
        return match[1], uuid.UUID(bytes=struct.pack("=2Q", int(match[2], 16), int(match[3], 16)))


def parse_line(line: str) -> LogEvent:
    """An event for any line; never fails."""
    match = _LINE.fullmatch(line)
    if match is None:
        return LogEvent(time=time.time(), message=line, kind=_classify("", line))
    return LogEvent(
        time=_moment(match["time"]),
        level=match["level"],
        component=match["component"].strip(),
        function=match["function"],
        message=match["message"],
        kind=_classify(match["level"], match["message"]),
    )


@functools.lru_cache(maxsize=8)
def _moment(text: str) -> float:
    try:
        return datetime.strptime(text, "%d/%m/%Y %H:%M:%S").astimezone().timestamp()
    except (ValueError, OverflowError):
        return time.time()


def _classify(level: str, message: str) -> EventKind:
    for kind, pattern in _KINDS:
        if pattern.search(message):
            return kind
    return EventKind.FATAL if level == "FATAL" else EventKind.OTHER


def failure_reason(events: list[LogEvent]) -> str | None:
    """The line of a failed start's log that tells most: the most specific kind first, else the last bad one."""
    for kind in (EventKind.BIND_FAILED, EventKind.EXPORT_FAILED, EventKind.CONFIG_FAILED):
        found = [event.message.strip() for event in events if event.kind is kind]
        if found:
            reason = next((message for message in found if not _SUMMARY.search(message)), found[0])
            return reason + _NO_NETWORK if "No IP address found" in reason else reason
    bad = [event for event in events if event.level in _BAD_LEVELS and not _NOISE.search(event.message)]
    specific = [event for event in bad if "Fatal errors" not in event.message]
    return (specific or bad)[-1].message.strip() if bad else None


def rotate(path: Path) -> None:
    """Keeps one previous log file beside the new one."""
    if path.exists():
        os.replace(path, previous(path))


def previous(path: Path) -> Path:
    return path.with_name(path.name + ".1")


class LogTail:
    """Reads what has been appended to a log file, and replaces the file when it has grown beyond `max_bytes`.

    ganesha opens its log anew for each line, so renaming the file is enough; a line that was being written just then
    still ends up in the old file, which is therefore left only at a later call that finds no more in it.
    """

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._rotated = False
        self._partial = b""

    def read(self) -> list[LogEvent]:
        """The complete lines since the last call, of at most 1 MiB; more is left to the next call."""
        events = self._lines()
        if self._rotated and not events:
            self._rotated = False
            self.close()
            events = self._lines()
        if self._file is not None and not self._rotated and self._file.tell() > self._max_bytes:
            rotate(self._path)
            self._rotated = True
        return events

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lines(self) -> list[LogEvent]:
        if self._file is None:
            try:
                self._file = open(self._path, "rb")  # noqa: SIM115  closed by close()
            except FileNotFoundError:
                return []
        data = self._partial + self._file.read(_READ)
        *lines, self._partial = data.split(b"\n")
        if len(self._partial) > _LINE_MAX:
            lines, self._partial = [*lines, self._partial], b""
        return [parse_line(line.decode("utf-8", "replace")) for line in lines if line.strip()]
