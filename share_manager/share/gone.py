"""Clients that are known to be gone, so that nobody waits for them in the grace period after a change of node.

A client whose machine died with the node that served would keep everybody else from new opens and locks until the grace
period ends. Whoever knows that it cannot come back with what it had says so while nobody serves (`share-manager records
gone`); the next node to serve removes its record first. What was said counts until the volume is served again, and no
longer: a client that has come back since is not forgotten.
"""

from __future__ import annotations

import msgspec

from ganesha import ClientRecord

GONE = "gone-clients"
_HEX = "0x"


class GoneClients(msgspec.Struct, frozen=True, kw_only=True):
    """`epoch`: the last one in which the volume was served. `names`: host names, or whole NFS client ids."""

    epoch: int
    names: tuple[str, ...]


def encode(gone: GoneClients) -> str:
    return msgspec.json.encode(gone).decode()


def names_for(text: str | None, served: int) -> frozenset[str]:
    """Who is gone, by what the record server says, when `served` was the last epoch to be served. Nonsense names
    nobody."""
    if text is None:
        return frozenset()
    try:
        gone = msgspec.json.decode(text, type=GoneClients)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return frozenset()
    return frozenset(gone.names) if gone.epoch == served else frozenset()


def is_one_of(record: ClientRecord, names: frozenset[str]) -> bool:
    """Linux calls itself `Linux NFSv4.2 HOST`, with a uniquifier or an address beside the host between slashes
    (nfs4_init_uniform_client_string, nfs4_init_nonuniform_client_string in fs/nfs/nfs4proc.c)."""
    client_id = _readable(record.client_id)
    if client_id in names:
        return True
    kind, _, rest = client_id.partition(" ")
    version, _, parts = rest.partition(" ")
    return kind == "Linux" and version.startswith("NFSv4.") and not names.isdisjoint(parts.split("/"))


def _readable(client_id: str) -> str:
    """Ganesha writes an id with a slash in hexadecimal."""
    if not client_id.startswith(_HEX):
        return client_id
    try:
        return bytes.fromhex(client_id.removeprefix(_HEX)).decode(errors="replace")
    except ValueError:
        return client_id
