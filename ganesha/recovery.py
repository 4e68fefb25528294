"""The client records that ganesha's `fs` recovery backend keeps on the volume.

A client that may reclaim is a directory `<address>-(<length>:<id>)` below `v4recov`, or below `v4old` while the grace
period after a restart lasts; with `Clustered`, ganesha's default, in `node<N>` below these. A name longer than 255
bytes is cut into nested directories. Files that start with \\x01 name revoked delegations (nfs-ganesha 4.3,
src/SAL/recovery/recovery_fs.c).
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ganesha.errors import RecoveryError

CURRENT, OLD = "v4recov", "v4old"
_NAME_MAX = 255
_NODE = re.compile(r"node\d+")
_RECORD = re.compile(rb"(?s)([^(]*)-\((\d{1,8}):(.*)\)")


class ClientRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A client that may reclaim its opens and locks after a restart of the server.

    `address` is what the server saw as its source. `client_id` is the client's own name for itself where that is
    printable, else ganesha's hexadecimal form of it. `old` records stem from before the last restart.
    """

    address: str
    client_id: str
    path: Path
    old: bool = False


def list_records(recovery_root: Path) -> list[ClientRecord]:
    """The records, in no order. A directory that does not exist has none. Raises RecoveryError.

    A client that has reclaimed during a grace period still in progress has a record in both places; it is listed once,
    as current.
    """
    records: dict[tuple[str, str], ClientRecord] = {}
    try:
        for old, top in ((True, recovery_root / OLD), (False, recovery_root / CURRENT)):
            for base in _bases(top):
                for name, path in _leaves(base, b""):
                    if (parsed := parse_name(name)) is not None:
                        record = ClientRecord(address=parsed[0], client_id=parsed[1], path=path, old=old)
                        records[parsed] = record
    except OSError as error:
        raise RecoveryError(f"cannot read the client records in {recovery_root}: {error.strerror}") from error
    return list(records.values())


def prune_records(recovery_root: Path, gone: Callable[[ClientRecord], bool] = lambda _: True) -> list[ClientRecord]:
    """Removes, durably, the records for which `gone` says so, and returns them. Not while ganesha runs.

    Only for clients that cannot come back with their old state: one whose record is missing loses its locks.
    Raises RecoveryError.
    """
    removed = []
    for record in list_records(recovery_root):
        if not gone(record):
            continue
        parts = record_parts(record.address, record.client_id)
        try:
            for top in (OLD, CURRENT):
                for base in list(_bases(recovery_root / top)):
                    _remove_leaf(base, parts)
        except OSError as error:
            raise RecoveryError(f"cannot remove the client record {record.path}: {error.strerror}") from error
        removed.append(record)
    return removed


def consolidate(recovery_root: Path, *, mapped: bool | None = None) -> None:
    """Gives every client exactly one record, below `v4recov`, durably. Before each start. Raises RecoveryError.

    Heals two faults of nfs-ganesha 4.3, both measured. A start reads the records in `v4old` and removes them, so the
    second restart within one grace period would forget every client that has not reclaimed yet. And a client with a
    record in both places counts twice, so that grace never ends early. A record in `v4old` at a start means that the
    last grace period did not end, so nothing that conflicts with the client's state has been granted.

    `mapped` says how this server will see IPv4 clients: as ::ffff:a.b.c.d where IPv6 sockets exist, else as a.b.c.d
    (measured). Records from a node of the other kind are renamed, for a client is known by the whole name. None leaves
    the names alone.
    """
    try:
        for top in (OLD, CURRENT):
            for base in list(_bases(recovery_root / top)):
                target = recovery_root / CURRENT / base.relative_to(recovery_root / top)
                for name, _ in list(_leaves(base, b"")):
                    wanted = name if mapped is None else _as_seen(name, mapped)
                    if top == OLD or wanted != name:
                        _make_directories(target, _parts(wanted))
                        _remove_leaf(base, _parts(name))
    except OSError as error:
        raise RecoveryError(f"cannot consolidate the client records in {recovery_root}: {error.strerror}") from error


def _as_seen(name: bytes, mapped: bool) -> bytes:
    address, rest = name.split(b"-(", 1)
    if b"." not in address:
        return name
    return (b"::ffff:" if mapped else b"") + address.removeprefix(b"::ffff:") + b"-(" + rest


def drop_all(recovery_root: Path) -> None:
    """Forgets every client, as after a clone or a revert, whose clients' state is that of another past."""
    try:
        shutil.rmtree(recovery_root)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RecoveryError(f"cannot remove the client records in {recovery_root}: {error.strerror}") from error
    sync_directory(recovery_root.parent)


def parse_name(name: bytes) -> tuple[str, str] | None:
    """(address, client id) of a whole record name; None when it is cut short or no record."""
    match = _RECORD.fullmatch(name)
    if match is None or int(match[2]) != len(match[3]):
        return None
    return os.fsdecode(match[1]), os.fsdecode(match[3])


def record_parts(address: str, client_id: str) -> list[str]:
    """The nested directory names under which ganesha keeps a client."""
    raw = os.fsencode(client_id)
    return _parts(os.fsencode(address) + b"-(%d:%s)" % (len(raw), raw))


def _parts(name: bytes) -> list[str]:
    return [os.fsdecode(name[at : at + _NAME_MAX]) for at in range(0, len(name), _NAME_MAX)]


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable. Raises RecoveryError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise RecoveryError(f"cannot make {path} durable: {error.strerror}") from error


def make_durable(recovery_root: Path) -> None:
    """Creates the directories that ganesha would, and fsyncs them and every record in them. Raises RecoveryError.

    ganesha itself never fsyncs: on a filesystem mounted without dirsync this is what makes records outlive a power cut.
    """
    try:
        for top in (CURRENT, OLD):
            (recovery_root / top).mkdir(mode=0o700, parents=True, exist_ok=True)
        directories = [Path(path) for path, _, _ in os.walk(recovery_root)]
    except OSError as error:
        raise RecoveryError(f"cannot prepare {recovery_root}: {error.strerror}") from error
    for directory in reversed(directories):
        sync_directory(directory)
    sync_directory(recovery_root.parent)


def _bases(top: Path) -> Iterator[Path]:
    yield top
    if top.is_dir():
        yield from (top / name for name in os.listdir(top) if _NODE.fullmatch(name))


def _leaves(directory: Path, prefix: bytes) -> Iterator[tuple[bytes, Path]]:
    try:
        with os.scandir(directory) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:  # ganesha removes records at any time
        return
    for name in names:
        whole = prefix + os.fsencode(name)
        path = directory / name
        if parse_name(whole) is not None:
            yield whole, path
        elif len(os.fsencode(name)) == _NAME_MAX:
            yield from _leaves(path, whole)


def _make_directories(base: Path, parts: list[str]) -> None:
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = base
    for part in parts:
        (directory / part).mkdir(mode=0o700, exist_ok=True)
        sync_directory(directory)
        directory /= part


def _remove_leaf(base: Path, parts: list[str]) -> None:
    leaf = base.joinpath(*parts)
    if not leaf.is_dir():
        return
    for name in os.listdir(leaf):
        if not (leaf / name).is_dir():
            (leaf / name).unlink()
    for depth in range(len(parts), 0, -1):
        directory = base.joinpath(*parts[:depth])
        if os.listdir(directory):
            break
        directory.rmdir()
        sync_directory(directory.parent)
