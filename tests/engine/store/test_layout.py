from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from engine.durable import replace_file
from engine.errors import FormatError, StoreError
from engine.store import Store, create_replica, inspect_replica, layout, resize_replica
from engine.store import resize as store_resize

MIB = 1 << 20
UUID = "0d8a4f1e-7b1c-4f52-9d0e-2d6d4a2f6b11"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    create_replica(tmp_path / "r1", volume="vol1", uuid=UUID, replica="r1", size=10 * MIB)
    return tmp_path / "r1"


def test_a_new_replica_has_these_bytes_on_disk(directory: Path) -> None:
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".img"}
    head = files.pop("volume-head-000.img.meta")
    assert re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"TIME", head) == (
        b'{"Name":"volume-head-000.img","Parent":"","Removed":false,"UserCreated":false,"Created":"TIME","Labels":null}\n'
    )
    intent = files.pop("intent.map")
    assert intent[:32].hex() == "534d524547494f4e01000000140000000a00000000000000d85f03a200000000"
    assert intent[32:] == bytes(4096 - 32 + 2)
    assert files == {
        "volume.meta": b'{"Size":10485760,"Head":"volume-head-000.img","Dirty":false,"Rebuilding":false,"Error":"",'
        b'"Parent":"","SectorSize":512,"BackingFilePath":""}\n',
        "share-manager.json": b'{"format":1,"volume":"vol1","uuid":"0d8a4f1e-7b1c-4f52-9d0e-2d6d4a2f6b11",'
        b'"replica":"r1","epoch":0,"incarnation":0}\n',
        "revision.counter": b"0" + bytes(4095),
        "share-manager.reserve": b"reserve\n" * (32 << 10),
    }
    image = (directory / "volume-head-000.img").stat()
    assert (image.st_size, image.st_blocks) == (10 * MIB, 0)


def test_inspect_tells_what_the_directory_holds(directory: Path) -> None:
    store = Store.open(directory)
    store.set_token(7, 3)
    store.set_marks(dirty=True, rebuilding=True)
    store.write(0, b"x" * 8192)
    store.sync()
    store.close()
    info = inspect_replica(directory)
    assert (info.volume, info.uuid, info.replica, info.size) == ("vol1", UUID, "r1", 10 * MIB)
    assert (info.epoch, info.incarnation, info.chain) == (7, 3, ("volume-head-000.img",))
    assert (info.dirty, info.rebuilding, info.allocated) == (True, True, 8192)


@pytest.mark.parametrize("size", [0, -4096, 4095, 5000])
def test_sizes_that_are_not_whole_blocks_are_refused(tmp_path: Path, size: int) -> None:
    with pytest.raises(StoreError, match="not a positive multiple of 4096"):
        create_replica(tmp_path / "r1", volume="v", uuid=UUID, replica="r1", size=size)
    assert not list(tmp_path.iterdir())


def test_nothing_is_created_over_something(directory: Path) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(StoreError, match="exists already"):
        create_replica(directory, volume="v", uuid=UUID, replica="r1", size=MIB)
    assert sorted(directory.iterdir()) == before


@pytest.mark.parametrize("step", range(6))
def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    calls = 0

    def fail(path: Path, content: bytes, mode: int = 0o644) -> None:
        nonlocal calls
        calls += 1
        if calls > step:
            raise OSError(28, "No space left on device")
        replace_file(path, content, mode)

    monkeypatch.setattr(layout, "replace_file", fail)
    if step < 5:
        with pytest.raises(StoreError, match="No space left on device"):
            create_replica(tmp_path / "r1", volume="v", uuid=UUID, replica="r1", size=MIB)
        assert not list(tmp_path.iterdir())
    else:
        create_replica(tmp_path / "r1", volume="v", uuid=UUID, replica="r1", size=MIB)


def test_what_a_crashed_creation_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".r1.creating").mkdir()
    (tmp_path / ".r1.creating" / "volume-head-000.img").touch()
    create_replica(tmp_path / "r1", volume="v", uuid=UUID, replica="r1", size=MIB)
    assert [path.name for path in tmp_path.iterdir()] == ["r1"]


def test_a_newer_format_is_refused_with_advice(directory: Path) -> None:
    (directory / "share-manager.json").write_text('{"format": 2, "shape": "unknown"}')
    with pytest.raises(FormatError, match=r"format 2, this release knows up to 1: use the newer release"):
        Store.open(directory)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("volume.meta", None, "volume.meta is missing"),
        ("volume.meta", b"", "volume.meta is damaged"),
        ("volume.meta", b'{"Size": 10485760, "Head": "../../etc/passwd"}', "names '../../etc/passwd' as head"),
        ("volume.meta", b'{"Size": 5000, "Head": "volume-head-000.img"}', "size 5000"),
        ("volume.meta", b'{"Size": 20971520, "Head": "volume-head-000.img"}', "it was truncated"),
        ("volume.meta", b'{"Size": 10485760, "Head": "volume-head-000.img", "BackingFilePath": "/b"}', "backing image"),
        ("share-manager.json", None, "share-manager.json is missing"),
        ("share-manager.json", b"\xff\xfe", "share-manager.json is damaged"),
        ("share-manager.json", b'{"format": 1}', "share-manager.json is damaged"),
        ("volume-head-000.img", None, "volume-head-000.img is missing"),
        ("volume-head-000.img.meta", None, "volume-head-000.img.meta is missing"),
        ("volume-head-000.img.meta", b'{"Name": "h", "Parent": "/etc/passwd"}', "names '/etc/passwd' as parent"),
        ("intent.map", None, "intent.map is missing"),
        ("intent.map", b"", "not a region map"),
        ("intent.map", b"SMREGION" + bytes(5000), "header checksum mismatch"),
        ("changes-r2.map", b"SMREGION", "changes-r2.map is damaged"),
    ],
)
def test_damage_is_one_clear_line(directory: Path, name: str, content: bytes | None, reason: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        Store.open(directory)
    assert reason in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    for use in (Store.open, inspect_replica):
        with pytest.raises(StoreError, match="there is no such directory"):
            use(tmp_path / "nowhere")


def test_two_cannot_open_one_directory(directory: Path) -> None:
    store = Store.open(directory)
    for use in (lambda: Store.open(directory), lambda: resize_replica(directory, 20 * MIB)):
        with pytest.raises(StoreError, match="another process is using it"):
            use()
    store.close()
    Store.open(directory).close()


def test_keys_of_other_releases_survive_a_rewrite(directory: Path) -> None:
    for name in ("volume.meta", "share-manager.json"):
        content = json.loads((directory / name).read_bytes())
        (directory / name).write_text(json.dumps(content | {"Later": [1, 2]}))
    store = Store.open(directory)
    store.set_marks(dirty=True)
    store.set_token(2, 1)
    store.close()
    for name in ("volume.meta", "share-manager.json"):
        assert json.loads((directory / name).read_bytes())["Later"] == [1, 2]


def test_a_token_never_goes_back(directory: Path) -> None:
    store = Store.open(directory)
    store.set_token(5, 2)
    store.set_token(5, 2)
    for lower in ((5, 1), (4, 9)):
        with pytest.raises(ValueError, match="lower"):
            store.set_token(*lower)
    store.close()
    assert Store.open(directory).token == (5, 2)


@pytest.mark.parametrize("crash_after", [0, 1, 2, 3])
def test_growing_is_whole_or_can_be_repeated(
    directory: Path, monkeypatch: pytest.MonkeyPatch, crash_after: int
) -> None:
    store = Store.open(directory)
    store.maps.track(["r2"])
    store.maps.mark([9])
    store.maps.sync()
    store.write(9 * MIB, b"end")
    store.close()
    steps = 0

    class Crash(BaseException):
        pass

    def count(inner: object) -> object:
        def step(*args: object) -> object:
            nonlocal steps
            if steps == crash_after:
                raise Crash
            steps += 1
            assert callable(inner)
            return inner(*args)

        return step

    for name in ("extend_image", "extend_map", "write_volume_meta"):
        monkeypatch.setattr(store_resize, name, count(getattr(store_resize, name)))
    with pytest.raises(Crash):
        resize_replica(directory, 30 * MIB)
    monkeypatch.undo()

    store = Store.open(directory)
    assert store.size == 10 * MIB
    assert store.maps.bitmap("") == store.maps.bitmap("r2") == bytes((0, 2))
    store.close()
    for _ in range(2):
        resize_replica(directory, 30 * MIB)
    store = Store.open(directory)
    assert store.read(9 * MIB, 4) == b"end\0"
    assert store.read(29 * MIB, 4096) == bytes(4096)
    assert store.maps.bitmap("") == store.maps.bitmap("r2") == bytes((0, 2, 0, 0))
    store.close()
    with pytest.raises(StoreError, match="cannot shrink"):
        resize_replica(directory, 20 * MIB)


def test_metadata_structs_read_what_longhorn_writes() -> None:
    raw = (
        b'{"Name":"volume-snap-a.img","Parent":"","Removed":true,"UserCreated":true,"Created":"x","Labels":{"k":"v"}}\n'
    )
    meta = msgspec.json.decode(raw, type=layout.ImageMeta)
    assert (meta.removed, meta.user_created, meta.labels) == (True, True, {"k": "v"})
    assert msgspec.json.encode(meta) + b"\n" == raw
