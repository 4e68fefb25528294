"""A replica directory as Longhorn's v1 engine leaves it."""

from __future__ import annotations

from pathlib import Path

BLOCK = 4096
WHEN = "2024-05-06T07:08:09Z"


def longhorn_directory(directory: Path, size: int) -> Path:
    """As its v1 engine leaves one: base <- new <- head, `aside` on base after a revert, keys that we do not know."""
    directory.mkdir()
    metas = {
        "volume-head-003.img": ("volume-snap-new.img", False),
        "volume-snap-new.img": ("volume-snap-base.img", False),
        "volume-snap-aside.img": ("volume-snap-base.img", False),
        "volume-snap-base.img": ("", True),
    }
    for image, (parent, removed) in metas.items():
        (directory / f"{image}.meta").write_text(
            f'{{"Name":"{image}","Parent":"{parent}","Removed":{str(removed).lower()},"UserCreated":true,'
            f'"Created":"{WHEN}","Labels":{{"RecurringJob":"daily"}}}}\n'
        )
        with open(directory / image, "wb") as file:
            file.truncate(size)
    for image, offset, data in (
        ("volume-snap-base.img", 0, b"base" * 2 * 1024),
        ("volume-snap-new.img", BLOCK, b"new_" * 1024),
        ("volume-snap-aside.img", BLOCK, b"side" * 1024),
        ("volume-head-003.img", 2 * BLOCK, b"head" * 1024),
    ):
        with open(directory / image, "r+b") as file:
            file.seek(offset)
            file.write(data)
    (directory / "volume-snap-new.img.checksum").write_text('{"algorithm":"crc64","checksum":"00"}')
    (directory / "volume.meta").write_text(
        f'{{"Size":{size},"Head":"volume-head-003.img","Dirty":true,"Rebuilding":false,"Error":"",'
        '"Parent":"volume-snap-new.img","SectorSize":512,"BackingFilePath":"","BackingFile":null}\n'
    )
    (directory / "revision.counter").write_bytes(b"4711".ljust(4096, b"\0"))
    return directory
