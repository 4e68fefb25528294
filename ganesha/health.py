"""Is the server really serving, and with handles that survive a failover?"""

import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from ganesha.errors import HealthError, Nfs4Error
from ganesha.reach import HERE, Reach
from ganesha.rpc import PROC_COMPOUND, PROC_NULL, RpcConnection, Unpacker, connect, pack_opaque, pack_uint

_GETFH, _LOOKUP, _PUTROOTFH = 10, 15, 24


@asynccontextmanager
async def _within(timeout: float, host: str, port: int) -> AsyncIterator[None]:
    with trio.move_on_after(timeout) as scope:
        yield
    if scope.cancelled_caught:
        raise HealthError(f"no answer from the NFS server at {host} port {port} within {timeout:g} s")


async def null_call(host: str, port: int, timeout: float, reach: Reach = HERE) -> None:
    """An NFSv4 NULL call (RFC 7530 section 16.1) over a new TCP connection.

    Raises HealthError when it is not answered, correctly, within `timeout` seconds.
    """
    async with _within(timeout, host, port), connect(host, port, reach=reach) as rpc:
        await rpc.call(PROC_NULL)


async def compound(
    rpc: RpcConnection, operations: list[tuple[int, bytes]], *, tag: bytes = b"", uid: int = 0, gid: int = 0
) -> Unpacker:
    """An NFSv4.0 COMPOUND (RFC 7530 section 16.2); returns the results, to be unpacked one operation after the other.

    The status of the whole is not checked: each operation's own status tells more.
    """
    body = pack_opaque(tag) + pack_uint(0) + pack_uint(len(operations))
    body += b"".join(pack_uint(number) + arguments for number, arguments in operations)
    reply = await rpc.call(PROC_COMPOUND, body, uid=uid, gid=gid)
    status = reply.uint()
    reply.opaque()
    if reply.uint() == 0:
        raise Nfs4Error("COMPOUND", status)
    return reply


def result(reply: Unpacker, number: int, name: str) -> Unpacker:
    """Steps over the header of the next operation's result. Raises Nfs4Error when it failed."""
    if (found := reply.uint()) != number:
        raise HealthError(f"the NFS server answered operation {found} where {name} was asked")
    status = reply.uint()
    if status != 0:
        raise Nfs4Error(name, status)
    return reply


async def export_handle(host: str, port: int, pseudo: str, timeout: float, *, source: str | None = None) -> bytes:
    """The file handle of an export's root, as a client gets it (PUTROOTFH, LOOKUP.., GETFH with AUTH_SYS).

    Needs NFSv4.0 among the server's minor versions. `source` is the local address to ask from.
    Raises Nfs4Error (status 2 when this client does not see the export), HealthError.
    """
    names = [name for name in pseudo.split("/") if name]
    operations = [(_PUTROOTFH, b"")]
    operations += [(_LOOKUP, pack_opaque(name.encode("utf-8", "surrogateescape"))) for name in names]
    operations.append((_GETFH, b""))
    async with _within(timeout, host, port), connect(host, port, source=source) as rpc:
        reply = await compound(rpc, operations)
    result(reply, _PUTROOTFH, "PUTROOTFH")
    for name in names:
        result(reply, _LOOKUP, f"LOOKUP {name}")
    return result(reply, _GETFH, "GETFH").opaque()


def handle_carries_uuid(handle: bytes, fs_uuid: uuid.UUID) -> bool:
    """Whether a handle names the filesystem by its UUID, and so stays valid on another node.

    ganesha falls back to device numbers, which change with the node (ESTALE), when blkid cannot tell the UUID.
    It copies the UUID's 16 bytes as two native 64-bit words; both byte orders are looked for.
    """
    swapped = struct.pack(">2Q", *struct.unpack("<2Q", fs_uuid.bytes))
    return fs_uuid.bytes in handle or swapped in handle
