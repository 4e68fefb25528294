from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable

import pytest
import trio
from crc32c import crc32c

from engine.wire.frame import HEADER_SIZE, MAGIC, MAX_PAYLOAD, FrameType, Status, encode_frame
from tests.engine.replica.client import Closed, connect
from tests.engine.replica.conftest import ReplicaProcess


def header(kind: int, *, magic: int = MAGIC, size: int = 0, payload_crc: int = 0) -> bytes:
    prefix = struct.pack("<IHHQQIII", magic, kind, 0, 1, 0, 4096, size, payload_crc)
    return prefix + struct.pack("<I", crc32c(prefix))


def flipped(random_bits: random.Random) -> bytes:
    frame = bytearray(encode_frame(FrameType.WRITE, 7, b"x" * 512, length=512))
    frame[random_bits.randrange(len(frame))] ^= 1 << random_bits.randrange(8)
    return bytes(frame)


BAD: dict[str, Callable[[random.Random], bytes]] = {
    "noise": lambda bits: bits.randbytes(bits.randrange(HEADER_SIZE, 2000)),
    "one bit flipped": flipped,
    "too large": lambda bits: header(FrameType.WRITE, size=MAX_PAYLOAD + 1 + bits.randrange(1 << 31)),
    "unknown type": lambda bits: header(bits.randrange(15, 1 << 16)),
    "a reply": lambda bits: header(FrameType.READ | 0x8000),
    "another magic": lambda bits: header(FrameType.READ, magic=bits.randrange(1 << 30)),
    "a hello again": lambda bits: encode_frame(FrameType.HELLO, 1, bits.randbytes(40)),
    "malformed message": lambda bits: encode_frame(
        bits.choice([FrameType.OPEN, FrameType.TRACK, FrameType.STATE, FrameType.BITMAP]), 1, bits.randbytes(30)
    ),
    "truncated": lambda bits: encode_frame(FrameType.WRITE, 7, b"x" * 512)[: bits.randrange(1, 500)],
}


@pytest.mark.parametrize("authenticated", [False, True])
async def test_thousands_of_malformed_frames_harm_nobody_else(replica: ReplicaProcess, authenticated: bool) -> None:
    assert replica.process is not None
    descriptors = f"/proc/{replica.process.pid}/fd"
    before = len(os.listdir(descriptors))
    done = False

    async def good() -> None:
        async with connect(replica.address) as client:
            assert (await client.open(1))[1] == Status.OK
            turn = 0
            while not done or turn < 50:
                block = turn.to_bytes(4, "big") * 1024
                assert (await client.write(turn % 100 * 4096, block))[1] == Status.OK
                assert (await client.read(turn % 100 * 4096, 4096))[5] == block
                turn += 1
            assert (await client.status()).dirty_regions == 1

    async def bad(seed: int) -> None:
        bits = random.Random(seed)
        for _ in range(12 if authenticated else 30):
            for make in BAD.values():
                async with connect(replica.address, key=b"k" * 32 if authenticated else None) as client:
                    try:
                        await client.stream.send_all(make(bits))
                        await client.stream.send_eof()
                        with trio.fail_after(10):
                            while True:
                                assert (await client.receive())[1] == Status.NOT_OPEN
                    except (Closed, trio.BrokenResourceError):
                        pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(good)
        async with trio.open_nursery() as attackers:
            for seed in range(4):
                attackers.start_soon(bad, seed)
        done = True
    with trio.fail_after(5):
        while len(os.listdir(descriptors)) > before:
            await trio.sleep(0.01)
    for reason in ("bad magic", "header checksum mismatch", "the connection ended within a frame"):
        assert reason in replica.log
    if authenticated:
        for reason in ("unknown frame type", "malformed Open", "payload checksum mismatch", "at most"):
            assert reason in replica.log
    assert replica.terminate() == 0
