"""Silent flips of a bit in what a replica has checksums of: what is at rest, and is found and repaired by a scrub."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from random import Random

from engine.client import EngineClient
from engine.operations import Scrub, Scrubbed
from engine.store.regions import REGION_SIZE
from engine.store.sums import Sums
from tests.chaos.field import Field

BLOCK = 4096


def flip(image: Path, rng: Random) -> int | None:
    """Flip one bit in a block of a sparse file that has a checksum, while nobody writes to it.

    Returns the offset of its byte, None when there is no such block. What has no checksum cannot be told from what
    somebody wrote.
    """
    sums = Sums(image.parent, image.name)
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        blocks = [block for block in _data(fd) if sums.has(block // REGION_SIZE)]
        if not blocks:
            return None
        offset = rng.choice(blocks) + rng.randrange(BLOCK)
        (byte,) = os.pread(fd, 1, offset)
        os.pwrite(fd, bytes([byte ^ 1 << rng.randrange(8)]), offset)
    finally:
        os.close(fd)
        sums.close()
    return offset


def _data(fd: int) -> list[int]:
    """Offsets of the blocks that are not holes."""
    blocks: list[int] = []
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return blocks
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        blocks += range(start - start % BLOCK, end, BLOCK)


async def scrub(field: Field) -> Scrubbed:
    """Have the engine look at everything and repair it. Raises EngineError."""
    return await EngineClient(field.paths.engine_control).run(Scrub(rate=0), Scrubbed)
