"""NFS mounts in guests, as a user makes them: with mount.nfs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tests.lab.guest import Guest

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Export:
    """What a client needs to know to mount a share."""

    address: str
    port: int
    path: str

    @property
    def source(self) -> str:
        return f"{self.address}:{self.path}"


def mount(guest: Guest, export: Export, version: str = "4.2", options: str = "") -> str:
    """Mount it at a new place in the guest and return that. Raises GuestError."""
    place = f"/mnt/share-{next(_numbers)}"
    words = f"vers={version},port={export.port},sec=sys,hard,timeo=600,retrans=2,retry=0"
    guest.run("mkdir", "-p", place)
    guest.run("mount", "-t", "nfs", "-o", f"{words},{options}" if options else words, export.source, place)
    guest.mounts.add(place)
    return place


def unmount(guest: Guest, place: str) -> None:
    guest.run("umount", place)
    guest.mounts.discard(place)


def drop(guest: Guest, place: str) -> None:
    """Unmount by force: after a failure the server may be gone for good."""
    guest.run("umount", "--force", "--lazy", place, check=False)
    guest.mounts.discard(place)


@contextlib.contextmanager
def mounted(guest: Guest, export: Export, version: str = "4.2", options: str = "") -> Iterator[str]:
    place = mount(guest, export, version, options)
    try:
        yield place
    except BaseException:
        drop(guest, place)
        raise
    unmount(guest, place)
