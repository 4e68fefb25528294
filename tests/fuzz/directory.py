"""A replica directory in which one file is damaged: opened, or refused with one clear line."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crc32c import crc32c

from engine.errors import EngineError
from engine.store import Store, create_replica
from engine.store.layout import inspect_replica
from tests.fuzz.parsers import UUID
from tests.fuzz.source import HOME, Source

SIZE = (1 << 20) + 4096
FILES = (
    "volume.meta",
    "share-manager.json",
    "volume-head-001.img.meta",
    "volume-snap-s1.img.meta",
    "intent.map",
    "changes-r2.map",
    "revision.counter",
)


@contextmanager
def replica() -> Iterator[Callable[[bytes], None]]:
    """A target that damages one file of a directory with a snapshot, dirty regions and a departed replica."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=HOME) as base:
        pristine, directory = Path(base, "pristine"), Path(base, "r1")
        create_replica(pristine, volume="vol1", uuid=UUID, replica="r1", size=SIZE)
        store = Store.open(pristine)
        store.write(0, b"x" * 4096)
        store.snapshot("s1")
        store.maps.track(["r2"])
        store.maps.mark([1])
        store.maps.sync()
        store.close()
        # opening one sets things right, so every input gets a directory of its own; the images stay what they are
        valid = {name: (pristine / name).read_bytes() for name in FILES}

        def target(data: bytes) -> None:
            source = Source(data)
            name = source.choice(FILES)
            content = source.mutated(valid[name]) if source.chance(2) else source.take(8192)
            if name.endswith(".map") and source.chance(2):
                # past the checksum
                head = content[:24].ljust(24, b"\0")
                content = head + struct.pack("<I", crc32c(head)) + content[28:]
            shutil.copytree(pristine, directory)
            try:
                (directory / name).write_bytes(content)
                for look in (inspect_replica, _use):
                    try:
                        look(directory)
                    except EngineError as error:
                        if "\n" in str(error):
                            raise ValueError("more than a line") from error
            finally:
                shutil.rmtree(directory)

        yield target


def _use(directory: Path) -> None:
    store = Store.open(directory)
    try:
        assert len(store.read(0, store.size)) == store.size
        store.write(4096, b"y" * 4096)
        store.set_token(*store.token)
        store.list_snapshots()
        store.maps.mark(range(store.maps.count))
        store.maps.sync()
    finally:
        store.close()
