"""ganesha's control interface, on the private message bus that runs beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio
from jeepney import (  # type: ignore[import-untyped]
    DBusAddress,
    DBusErrorResponse,
    HeaderFields,
    Message,
    MessageFlag,
    MessageType,
    message_bus,
    new_method_call,
)
from jeepney.auth import BEGIN, AuthenticationError, Authenticator  # type: ignore[import-untyped]
from jeepney.io.trio import DBusConnection  # type: ignore[import-untyped]
from jeepney.wrappers import unwrap_msg  # type: ignore[import-untyped]

from ganesha.errors import DbusError, UpdateError

BUS_NAME = "org.ganesha.nfsd"
TIMEOUT = 5.0
_MINOR_OF_FLAG = {"NFSv3": "3", "NFSv40": "4.0", "NFSv41": "4.1", "NFSv42": "4.2"}

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>{address}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <deny user="*"/>
    <allow user="{uid}"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


def bus_address(socket: Path) -> str:
    """The D-Bus address of a unix socket, with the escapes of the D-Bus specification ("Server Addresses")."""
    safe = b"-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz/.\\"
    return "unix:path=" + "".join(chr(byte) if byte in safe else f"%{byte:02x}" for byte in bytes(socket))


class NfsClient(msgspec.Struct, frozen=True, kw_only=True):
    """A client address that has talked to the server since it started.

    `versions` are the NFS versions it used, such as "4.2"; `last_seen` is in seconds since 1970; `client_ids` are the
    names under which clients at this address hold a lease, from the recovery records.
    """

    address: str
    versions: tuple[str, ...]
    last_seen: float
    client_ids: tuple[str, ...] = ()


class IoStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the server started. Latency is the sum over all operations, in seconds."""

    operations: int
    errors: int
    bytes_requested: int
    bytes_transferred: int
    latency: float


class ExportStats(msgspec.Struct, frozen=True, kw_only=True):
    """I/O on one export by one NFS version ("4.0", "4.1", "4.2")."""

    export_id: int
    version: str
    read: IoStats
    write: IoStats


class ServerStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the server started: I/O per export and version, operations by name (such as "NFSv4.2")."""

    exports: tuple[ExportStats, ...]
    operations: Mapping[str, int]


def plain_address(address: str) -> str:
    """ganesha sees an IPv4 client of its IPv6 socket as ::ffff:a.b.c.d; people know it as a.b.c.d."""
    return address.removeprefix("::ffff:") if "." in address else address


class Control:
    """Calls to a running ganesha. Each makes a connection of its own (about 1 ms), so a broken bus harms one call."""

    def __init__(self, socket: Path) -> None:
        self._socket = str(socket)

    async def name_owned(self, *, timeout: float = TIMEOUT) -> bool:
        """Whether ganesha has connected to the bus. Raises DbusError."""
        daemon = DBusAddress("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
        (owned,) = await self._call(daemon, "NameHasOwner", "s", (BUS_NAME,), timeout)
        return bool(owned)

    async def in_grace(self, *, timeout: float = TIMEOUT) -> bool:
        """Whether the grace period is on. Raises DbusError."""
        reply = await self._ganesha("admin", "admin", "get_grace", timeout=timeout)
        return bool(reply[0])

    async def clients(self, *, timeout: float = TIMEOUT) -> list[NfsClient]:
        """The client addresses seen since the start. Raises DbusError."""
        _, rows = await self._ganesha("ClientMgr", "clientmgr", "ShowClients", timeout=timeout)
        clients = []
        for address, flags, (seconds, nanoseconds) in rows:
            versions = tuple(_MINOR_OF_FLAG[name] for name, used in flags if used and name in _MINOR_OF_FLAG)
            clients.append(
                NfsClient(address=plain_address(address), versions=versions, last_seen=seconds + nanoseconds / 1e9)
            )
        return clients

    async def export_ids(self, *, timeout: float = TIMEOUT) -> set[int]:
        """The ids of the exports in force, without ganesha's own pseudo root (0). Raises DbusError."""
        _, rows = await self._ganesha("ExportMgr", "exportmgr", "ShowExports", timeout=timeout)
        return {row[0] for row in rows} - {0}

    async def add_export(self, config_file: Path, export_id: int, *, timeout: float = TIMEOUT) -> None:
        await self._change("AddExport", config_file, export_id, timeout)

    async def update_export(self, config_file: Path, export_id: int, *, timeout: float = TIMEOUT) -> None:
        await self._change("UpdateExport", config_file, export_id, timeout)

    async def remove_export(self, export_id: int, *, timeout: float = TIMEOUT) -> None:
        """Raises UpdateError, DbusError."""
        try:
            await self._ganesha("ExportMgr", "exportmgr", "RemoveExport", "q", (export_id,), timeout=timeout)
        except _RefusedError as error:
            raise UpdateError(f"cannot remove export {export_id}: {error}") from error

    async def stats(self, *, timeout: float = TIMEOUT) -> ServerStats:
        """Raises DbusError."""
        io = _checked(await self._ganesha("ExportMgr", "exportstats", "GetNFSIO", timeout=timeout))
        operations = _checked(await self._ganesha("ExportMgr", "exportstats", "GetGlobalOPS", timeout=timeout))
        exports = [
            ExportStats(
                export_id=export_id,
                version=_MINOR_OF_FLAG.get(version, version),
                read=_io_stats(read),
                write=_io_stats(write),
            )
            for export_id, version, read, write in io[1]
        ]
        return ServerStats(exports=tuple(exports), operations=_pairs(operations[1]))

    async def _change(self, method: str, config_file: Path, export_id: int, timeout: float) -> None:
        body = (str(config_file), f"EXPORT(Export_Id={export_id})")
        try:
            await self._ganesha("ExportMgr", "exportmgr", method, "ss", body, timeout=timeout)
        except _RefusedError as error:
            raise UpdateError(f"{method} of export {export_id} failed: {error}") from error

    async def _ganesha(
        self, node: str, interface: str, method: str, signature: str = "", body: tuple[Any, ...] = (), *, timeout: float
    ) -> tuple[Any, ...]:
        address = DBusAddress(f"/org/ganesha/nfsd/{node}", BUS_NAME, f"{BUS_NAME}.{interface}")
        return await self._call(address, method, signature, body, timeout)

    async def _call(
        self, address: DBusAddress, method: str, signature: str, body: tuple[Any, ...], timeout: float
    ) -> tuple[Any, ...]:
        message = new_method_call(address, method, signature or None, body)
        message.header.flags |= MessageFlag.no_auto_start
        with trio.move_on_after(timeout):
            try:
                async with await trio.open_unix_socket(self._socket) as stream:
                    await _authenticate(stream)
                    connection = DBusConnection(stream.socket)
                    await _exchange(connection, message_bus.Hello())
                    return await _exchange(connection, message)
            except DBusErrorResponse as error:
                raise _RefusedError(f"{error.name}: {_text(error.data)}") from error
            except (OSError, trio.BrokenResourceError, trio.EndOfChannel, AuthenticationError) as error:
                raise DbusError(f"ganesha's message bus is unreachable ({method}): {error}") from error
        raise DbusError(f"ganesha did not answer {method} within {timeout:g} s")


# jeepney's own open_dbus_connection leaks its socket when it fails, and spins when the bus hangs up on it.
async def _authenticate(stream: trio.SocketStream) -> None:
    authenticator = Authenticator()
    for line in authenticator:
        await stream.send_all(line)
        answer = await stream.receive_some()
        if not answer:
            raise trio.EndOfChannel("closed during authentication")
        authenticator.feed(answer)
    await stream.send_all(BEGIN)


async def _exchange(connection: DBusConnection, message: Message) -> tuple[Any, ...]:
    serial = next(connection.outgoing_serial)
    await connection.send(message, serial=serial)
    while True:
        reply = await connection.receive()
        answers = reply.header.message_type in (MessageType.method_return, MessageType.error)
        if answers and reply.header.fields.get(HeaderFields.reply_serial) == serial:
            return tuple(unwrap_msg(reply))


class _RefusedError(DbusError):
    pass


def _text(data: object) -> str:
    return " ".join(str(part) for part in data) if isinstance(data, tuple) else str(data)


def _checked(reply: tuple[Any, ...]) -> tuple[Any, ...]:
    ok, message, *rest = reply
    if not ok:
        raise DbusError(f"ganesha refused: {message}")
    return tuple(rest)


def _io_stats(row: tuple[int, ...]) -> IoStats:
    requested, transferred, operations, errors, latency, _ = row
    return IoStats(
        operations=operations,
        errors=errors,
        bytes_requested=requested,
        bytes_transferred=transferred,
        latency=latency / 1e9,
    )


def _pairs(flat: Sequence[Any]) -> dict[str, int]:
    return {str(name): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}
