"""Formatting, checking, mounting and growing on real loop devices."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from share_manager.errors import CommandError, FilesystemKindError, ForeignContentError
from share_manager.events import ListSink, Reporter
from share_manager.share import filesystem, formatting, private
from share_manager.share.filesystem import FilesystemOptions, Mounted
from share_manager.share.formatting import Kind
from share_manager.share.procfs import mount_at
from share_manager.share.supervise import next_ganesha_epoch

pytestmark = pytest.mark.system

MIB = 1 << 20
VOLUME = "5b1c6e0e-6a5e-4f6f-9f0a-0b8c5d0e7a11"
MakeLoop = Callable[[int], str]


class Place:
    def __init__(self, directory: Path) -> None:
        self.marker = directory / "formatting"
        self.inherited = directory / "inherited-uuids"
        self.target = directory / "mnt"
        self.sink = ListSink()
        self.report = Reporter(self.sink)
        self.given_up: list[str] = []

    def mounted(
        self, device: str, volume: str = VOLUME, **options: object
    ) -> contextlib.AbstractAsyncContextManager[Mounted]:
        return filesystem.mounted(
            device,
            volume="v",
            volume_uuid=volume,
            marker=self.marker,
            inherited=self.inherited,
            target=self.target,
            options=FilesystemOptions(**options),  # type: ignore[arg-type]
            report=self.report,
            give_up=self.given_up.append,
        )

    def names(self) -> list[str]:
        return [event["event"] for event in self.sink.events]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_made_once_then_kept(kind: Kind, make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(320 * MIB)
    async with place.mounted(device, kind=kind, root_owner=(1000, 100), root_mode=0o2770) as mounted:
        found = mount_at(place.target)
        assert found is not None
        assert {"dirsync", "nodev", "nosuid", "noatime"} <= found.options
        stat = mounted.data.stat()
        assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (1000, 100, 0o2770)
        (mounted.data / "file").write_text("kept")
        mounted.data.chmod(0o750)
        assert mounted.fault() is None
    assert mount_at(place.target) is None
    async with place.mounted(device) as mounted:
        assert mounted.kind == kind
        assert (mounted.data / "file").read_text() == "kept"
        assert mounted.data.stat().st_mode & 0o7777 == 0o750
    async with place.mounted(device, root_mode=0o777) as mounted:
        assert mounted.data.stat().st_mode & 0o7777 == 0o777
        assert mounted.data.stat().st_uid == 1000
    assert place.names().count("formatted") == 1
    found_uuid = (await formatting.probe(device))["UUID"]
    assert uuid.UUID(found_uuid) == filesystem.filesystem_uuid(VOLUME)
    with pytest.raises(FilesystemKindError):
        async with place.mounted(device, kind="xfs" if kind == "ext4" else "ext4"):
            pass
    assert place.given_up == []


def write(device: str, offset: int, data: bytes) -> None:
    with open(device, "r+b") as disk:
        disk.seek(offset)
        disk.write(data)


def contents(device: str) -> bytes:
    return Path(device).read_bytes()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mkfs.ext4", "-q"], "not this volume's own"),
        (["mkfs.xfs", "-q"], "not this volume's own"),
        (["mkswap"], "swap"),
    ],
)
async def test_never_over_a_signature(argv: list[str], words: str, make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(320 * MIB)
    subprocess.run([*argv, device], check=True, capture_output=True, input=b"")
    before = contents(device)
    with pytest.raises(ForeignContentError, match=words):
        async with place.mounted(device):
            pass
    assert contents(device) == before
    assert not place.marker.exists()


async def test_never_over_a_partition_table(make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    # one Linux partition: status, CHS, type, CHS, first sector and count (of 4096 bytes)
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\0\0\0", 256, 8192)
    write(device, 446, entry + bytes(48) + b"\x55\xaa")
    with pytest.raises(ForeignContentError, match="a dos partition table"):
        async with place.mounted(device):
            pass


@pytest.mark.parametrize("offset", [0, 3 * MIB, 64 * MIB - 4096])
async def test_never_over_unknown_data(offset: int, make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    write(device, offset, b"x" * 4096)
    with pytest.raises(ForeignContentError, match=f"at byte {offset}"):
        async with place.mounted(device):
            pass


async def test_formatting_that_was_cut_off_begins_again(make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    place.marker.write_text("ext4\n")
    write(device, 0, b"half a filesystem")
    async with place.mounted(device) as mounted:
        assert mounted.data.is_dir()
    assert not place.marker.exists()
    assert place.names() == ["formatted", "mounted"]


async def test_formatting_that_fails_leaves_a_blank_volume(
    make_loop: MakeLoop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_loop(64 * MIB)

    async def fail(*argv: object, **options: object) -> None:
        raise CommandError(("mkfs.ext4",), 1, "no")

    monkeypatch.setattr(formatting, "make_filesystem", fail)
    with pytest.raises(CommandError):
        async with place.mounted(device):
            pass
    assert not place.marker.exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
async def test_grows_with_its_device(kind: Kind, make_loop: MakeLoop, place: Place, tmp_path: Path) -> None:
    device = make_loop(320 * MIB)
    async with place.mounted(device, kind=kind) as mounted:
        (mounted.data / "file").write_text("kept")
    os.truncate(tmp_path / "disk0.img", 640 * MIB)
    subprocess.run(["losetup", "--set-capacity", device], check=True)
    async with place.mounted(device) as mounted:
        assert (mounted.data / "file").read_text() == "kept"
        found = os.statvfs(mounted.root)
        assert found.f_blocks * found.f_frsize > 500 * MIB
    assert place.names().count("grown") == 1
    async with place.mounted(device):
        pass
    assert place.names().count("grown") == 1


async def test_an_error_of_the_filesystem_is_noticed_and_repaired(make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    async with place.mounted(device) as mounted:
        trigger = Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error")
        if not trigger.exists():
            pytest.skip("this kernel cannot be asked for an ext4 error")
        trigger.write_text("test")
        assert mounted.fault() is not None
    async with place.mounted(device) as mounted:
        assert mounted.fault() is None
    assert [event["repaired"] for event in place.sink.events if event["event"] == "checked"] == [True]


@contextlib.asynccontextmanager
async def room_on(place: Place, device: str, size: int, kind: Kind | None = None) -> AsyncIterator[private.PrivateRoom]:
    async with (
        place.mounted(device, kind=kind),
        private.private_room(
            place.target,
            size,
            place.report,
            place.target.with_name("drop-recovery"),
            lambda device: None,
            place.given_up.append,
        ) as room,
    ):
        yield room


def fill(directory: Path) -> None:
    """Take every block, then every inode."""
    chunk = os.urandom(MIB)
    for size in (MIB, 4096):
        with contextlib.suppress(OSError), (directory / f"fill{size}").open("wb", buffering=0) as file:
            while file.write(chunk[:size]) == size:
                pass
    with contextlib.suppress(OSError):
        for number in range(200_000):
            os.close(os.open(directory / f"i{number}", os.O_CREAT | os.O_EXCL, 0o600))


@pytest.mark.parametrize(("kind", "size"), [("ext4", 64 * MIB), ("xfs", 320 * MIB)])
async def test_full_data_leaves_room_for_client_records(
    kind: Kind, size: int, make_loop: MakeLoop, place: Place
) -> None:
    device = make_loop(size)
    async with room_on(place, device, size, kind) as room:
        fill(place.target / "data")
        with pytest.raises(OSError, match="No space left"):
            (place.target / "data" / "one-more").mkdir()
        for number in range(1000):
            (room.recovery_root / f"::ffff:10.0.0.1-(20:client{number:014})").mkdir()
        assert room.take_ganesha_epoch() > 0
    async with room_on(place, device, size) as room:
        assert len(list(room.recovery_root.glob("*client*"))) == 1000
    assert place.given_up == []
    assert "private_repaired" not in place.names()


async def test_client_records_of_another_past_are_dropped_once(make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    async with room_on(place, device, 64 * MIB) as room:
        epoch = room.take_ganesha_epoch()
        (room.recovery_root / "v4recov" / "10.0.0.1-(3:one)").mkdir()
    marker = place.target.with_name("drop-recovery")
    marker.touch()
    for dropped in (1, 1):
        async with room_on(place, device, 64 * MIB) as room:
            assert not list(room.recovery_root.glob("*/*"))
            assert (room.recovery_root / "v4recov").is_dir()
            assert room.take_ganesha_epoch() > epoch
        assert not marker.exists()
        assert place.names().count("recovery_dropped") == dropped


async def test_the_private_room_is_private_and_synchronous(make_loop: MakeLoop, place: Place) -> None:
    device = make_loop(64 * MIB)
    async with room_on(place, device, 64 * MIB) as room:
        assert room.directory.stat().st_mode & 0o7777 == 0o700
        flags = subprocess.run(["lsattr", "-d", room.directory], capture_output=True, text=True, check=True).stdout
        assert "D" in flags.split()[0]
        first = room.take_ganesha_epoch()
        assert room.take_ganesha_epoch() == first + 1
        assert room.fault() is None
    async with room_on(place, device, 64 * MIB) as room:
        assert room.take_ganesha_epoch() >= next_ganesha_epoch(first + 1, 0)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("interrupted", [False, True])
async def test_the_filesystem_of_a_clone_gets_a_uuid_of_its_own(
    kind: Kind, interrupted: bool, make_loop: MakeLoop, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_loop(320 * MIB)
    async with place.mounted(device, kind=kind) as mounted:
        (mounted.data / "file").write_text("kept")
        old = str(mounted.uuid)
    clone = str(uuid.uuid4())
    with pytest.raises(ForeignContentError):
        async with place.mounted(device, clone):
            pass
    place.inherited.write_text(f"{uuid.uuid4()}\n{old}\n")
    if interrupted:

        def killed(_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            # the UUID is there, and nobody knows it
            patch.setattr(filesystem, "sync_directory", killed)
            patch.setattr(Path, "unlink", killed)
            with pytest.raises(BaseException):  # noqa: B017
                async with place.mounted(device, clone):
                    pass
        assert place.inherited.exists()
    async with place.mounted(device, clone) as mounted:
        assert (mounted.data / "file").read_text() == "kept"
        assert mounted.uuid == filesystem.filesystem_uuid(clone)
    assert not place.inherited.exists()
    assert (await formatting.probe(device))["UUID"] == str(filesystem.filesystem_uuid(clone)) != old
    if kind == "ext4":
        subprocess.run(["e2fsck", "-f", "-n", device], check=True, capture_output=True)
    async with place.mounted(device, clone) as mounted:
        assert (mounted.data / "file").read_text() == "kept"
    assert place.names().count("renewed") == 1 + interrupted
