"""LUKS headers on real loop devices. Unlocking needs dm-crypt: tests/system/test_encryption.py does that in a guest."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from engine.durable import replace_file
from share_manager.encryption import Encryption, LuksParameters, Passphrase
from share_manager.errors import (
    CommandError,
    HeaderBackupError,
    HeaderLostError,
    KeyMissingError,
    NotEncryptedError,
    UsageError,
    WrongPassphraseError,
)
from share_manager.events import ListSink, Reporter
from share_manager.paths import VolumePaths
from share_manager.share import cryptsetup, luks
from share_manager.share.commands import run
from share_manager.share.cryptsetup import opens
from share_manager.share.luks import (
    Header,
    Keys,
    change_passphrase,
    read_header,
    restore_header,
    save_header,
    write_header,
)
from tests.share_manager.conftest import run_command

pytestmark = pytest.mark.system

MIB = 1 << 20
OLD, NEW, WRONG = Passphrase(b"the old one"), Passphrase(b"the new one"), Passphrase(b"another")
UUID = "5b1c6e0e-6a5e-4f6f-9f0a-0b8c5d0e7a11"
QUICK = LuksParameters(pbkdf="pbkdf2", pbkdf_time=1)
MakeLoop = Callable[[int], str]


@pytest.fixture
def device(make_loop: MakeLoop) -> str:
    return make_loop(32 * MIB)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A header with one key slot for OLD. To make one takes seconds, for what it costs is measured."""
    file = tmp_path_factory.mktemp("luks") / "template"
    with file.open("wb") as image:
        image.truncate(32 * MIB)
    trio.run(cryptsetup.make_header, str(file), UUID, OLD, QUICK)
    return file.read_bytes()[:MIB]


@pytest.fixture
def encrypted(device: str, template: bytes) -> str:
    write(device, 0, template)
    return device


@pytest.fixture
def paths(tmp_path: Path) -> VolumePaths:
    paths = VolumePaths(tmp_path / "data", "v")
    paths.directory.mkdir(parents=True)
    return paths


def contents(device: str) -> bytes:
    return Path(device).read_bytes()


def write(device: str, at: int, data: bytes) -> None:
    with open(device, "r+b") as disk:
        disk.seek(at)
        disk.write(data)


async def prepare(device: str, paths: VolumePaths, *, wanted: bool = True, key: Passphrase | None = OLD) -> Keys:
    asked = Encryption(wanted=wanted, passphrase=key, parameters=QUICK)
    keys = Keys(asked)
    await luks._prepare(device, paths, asked, keys, Reporter(ListSink()))
    return keys


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing() -> None:
        pass

    monkeypatch.setattr(cryptsetup, "require_dm_crypt", nothing)


async def test_a_header_is_made_once(device: str, paths: VolumePaths, without_kernel: None) -> None:
    made = await prepare(device, paths)
    assert made.volume_key is not None
    assert len(made.volume_key.reveal()) == 32
    header = read_header(paths)
    assert header is not None
    assert (header.finished, header.uuid) == (True, await cryptsetup.luks_uuid(device))
    # what the new mapping reads as may be formatted
    assert paths.formatting.exists()
    before = contents(device)
    again = await prepare(device, paths, wanted=False)
    assert again.volume_key is not None
    assert again.volume_key.reveal() == made.volume_key.reveal()
    # known from the device alone
    paths.encryption.unlink()
    await prepare(device, paths, wanted=False)
    assert read_header(paths) == header
    with pytest.raises(KeyMissingError):
        await prepare(device, paths, wanted=False, key=None)
    with pytest.raises(WrongPassphraseError):
        await prepare(device, paths, key=WRONG)
    assert contents(device) == before


async def test_a_plain_device_is_never_encrypted(device: str, paths: VolumePaths, without_kernel: None) -> None:
    for at in (32 * MIB - 4096, 0):
        write(device, at, b"somebody's data")
        before = contents(device)
        for wanted in (True, False):
            with pytest.raises(NotEncryptedError):
                await prepare(device, paths, wanted=wanted)
        assert contents(device) == before
        assert read_header(paths) is None


async def test_a_clients_data_is_not_taken_for_a_header(device: str, template: bytes, paths: VolumePaths) -> None:
    """The second copy of a header, where a file of a plain volume may be."""
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    write(device, 0x4000, template[0x4000:])
    before = contents(device)
    keys = await prepare(device, paths, wanted=False, key=None)
    assert keys.volume_key is None
    assert contents(device) == before


async def test_one_copy_of_the_header_is_enough(device: str, paths: VolumePaths, without_kernel: None) -> None:
    made = await prepare(device, paths)
    write(device, 0, bytes(4096))
    again = await prepare(device, paths, wanted=False)
    assert again.volume_key is not None
    assert made.volume_key is not None
    assert again.volume_key.reveal() == made.volume_key.reveal()


async def test_a_format_that_was_cut_off_is_done_again(
    device: str, template: bytes, paths: VolumePaths, without_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def make_header(device: str, *_: object) -> None:
        write(device, 0, template)

    monkeypatch.setattr(cryptsetup, "make_header", make_header)
    real = replace_file
    for step in range(3):
        calls = 0

        def cut(path: Path, content: bytes, **mode: int) -> None:
            nonlocal calls
            calls += 1
            if calls > step:  # noqa: B023
                raise KeyboardInterrupt
            real(path, content, **mode)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(luks, "replace_file", cut)
            await prepare(device, paths)
        known = read_header(paths)
        assert known is None or not known.finished
        if known is not None:
            with pytest.raises(KeyMissingError):
                await prepare(device, paths, wanted=False, key=None)
    keys = await prepare(device, paths)
    assert keys.volume_key is not None
    assert paths.formatting.exists()


async def test_a_cipher_that_is_none_leaves_a_blank_device(
    device: str, paths: VolumePaths, without_kernel: None
) -> None:
    asked = Encryption(wanted=True, passphrase=OLD, parameters=LuksParameters(cipher="rot13-ecb", pbkdf="pbkdf2"))
    with pytest.raises(CommandError):
        await luks._prepare(device, paths, asked, Keys(asked), Reporter(ListSink()))
    assert read_header(paths) is None
    assert not any(contents(device))


async def test_a_lost_header_is_not_made_anew(device: str, paths: VolumePaths, without_kernel: None) -> None:
    write_header(paths, Header(uuid=UUID, finished=True))
    for wanted in (True, False):
        with pytest.raises(HeaderLostError, match="luks-header restore v"):
            await prepare(device, paths, wanted=wanted)
    assert not any(contents(device))


class Cut(BaseException):
    pass


async def test_a_change_of_passphrase_that_is_cut_off(
    device: str, template: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each program that is run: one of the two opens the volume, and another try finishes."""
    real = run
    arguments: list[str] = []
    for step in range(1, 7):
        left = step

        async def run_some(*argv: str, **options: object) -> tuple[int, str]:
            nonlocal left
            left -= 1
            if left == 0:
                raise Cut
            arguments.extend(argv)
            return await real(*argv, **options)  # type: ignore[arg-type]

        write(device, 0, template)
        with monkeypatch.context() as patch:
            patch.setattr(cryptsetup, "run", run_some)
            with contextlib.nullcontext() if step > 5 else pytest.raises(Cut):
                await change_passphrase(device, OLD, NEW)
        assert await opens(device, OLD) or await opens(device, NEW)
        await change_passphrase(device, OLD, NEW)
        assert await opens(device, NEW)
        assert not await opens(device, OLD)
        assert len(await cryptsetup.keyslots(device)) == 1
    # it is so already
    assert await change_passphrase(device, OLD, NEW) == 0
    key = await cryptsetup.volume_key(device, NEW)
    write(device, 0, template)
    assert (await cryptsetup.volume_key(device, OLD)).reveal() == key.reveal()
    for secret in (OLD, NEW):
        assert not any(secret.reveal().decode() in argument for argument in arguments)


async def test_a_wrong_passphrase_changes_nothing(encrypted: str) -> None:
    before = contents(encrypted)
    with pytest.raises(WrongPassphraseError):
        await change_passphrase(encrypted, WRONG, NEW)
    with pytest.raises(UsageError):
        await change_passphrase(encrypted, OLD, OLD)
    assert contents(encrypted) == before


async def test_another_key_slot_stays(encrypted: str) -> None:
    slots = await cryptsetup.keyslots(encrypted)
    await cryptsetup.add_key(encrypted, OLD, WRONG, slots["0"].kdf)
    assert await change_passphrase(encrypted, OLD, NEW) == 1
    assert await opens(encrypted, WRONG)
    assert not await opens(encrypted, OLD)


async def test_argon2_parameters_are_bounded_and_kept(device: str) -> None:
    wanted = LuksParameters(pbkdf_memory=1 << 20, pbkdf_time=100)
    await cryptsetup.make_header(device, UUID, OLD, wanted)
    before = (await cryptsetup.keyslots(device))["0"].kdf
    assert (before.type, before.memory) == ("argon2i", 1024)
    await change_passphrase(device, OLD, NEW)
    assert [slot.kdf for slot in (await cryptsetup.keyslots(device)).values()] == [before]


async def test_a_header_comes_back(
    device: str, make_loop: MakeLoop, template: bytes, paths: VolumePaths, without_kernel: None, tmp_path: Path
) -> None:
    file = tmp_path / "header"
    with pytest.raises(NotEncryptedError):
        await save_header(device, paths, file)
    with pytest.raises(NotEncryptedError):
        await restore_header(device, paths, file)
    made = await prepare(device, paths)
    uuid = await save_header(device, paths, file)
    assert file.stat().st_mode & 0o077 == 0
    with pytest.raises(HeaderBackupError, match="exists"):
        await save_header(device, paths, file)
    write(device, 0, os.urandom(16 * MIB))
    with pytest.raises(HeaderLostError):
        await prepare(device, paths)
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    with pytest.raises(HeaderBackupError, match="no backup"):
        await restore_header(device, paths, junk)
    foreign = make_loop(32 * MIB)
    write(foreign, 0, template)
    other = tmp_path / "other"
    await save_header(foreign, paths, other)
    with pytest.raises(HeaderBackupError, match="another volume"):
        await restore_header(device, paths, other)
    assert await restore_header(device, paths, file) == uuid
    again = await prepare(device, paths)
    assert again.volume_key is not None
    assert made.volume_key is not None
    assert again.volume_key.reveal() == made.volume_key.reveal()


# its twin is tests/system/test_encryption.py, where the kernel has it
@pytest.mark.skipif("device-mapper" in Path("/proc/misc").read_text(), reason="this kernel has device-mapper")
def test_without_dm_crypt_nothing_is_begun(root: None, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    argv = ("--encrypt", "--passphrase-file", str(tmp_path / "key"), "--data-dir", str(tmp_path / "data"))
    done = run_command("serve", "nodm", *argv)
    assert done.returncode == 3
    assert "this kernel has no dm-crypt" in done.stderr
    assert os.listdir(tmp_path / "data/volumes") == []


async def test_a_standby_derives_the_volume_key_from_a_copy_of_the_header(
    device: str, paths: VolumePaths, without_kernel: None, tmp_path: Path
) -> None:
    keys = await prepare(device, paths)
    copy = tmp_path / "header"
    cryptsetup.write_area(copy, cryptsetup.read_area(device))
    passphrase = tmp_path / "passphrase"
    passphrase.write_bytes(NEW.reveal())
    # it was started with one that was changed since, and finds the present one where the other was
    other = Keys(Encryption(passphrase=NEW, source=str(passphrase)))
    with pytest.raises(WrongPassphraseError):
        await other.derive(str(copy))
    passphrase.write_bytes(OLD.reveal())
    await other.derive(str(copy))
    assert keys.volume_key is not None
    assert other.volume_key is not None
    assert other.volume_key.reveal() == keys.volume_key.reveal()
    assert (other.passphrase, other.uuid) == (OLD, keys.uuid)
    other.look_again()
    assert await other.fit(device)


async def test_a_key_of_another_header_is_forgotten(device: str, paths: VolumePaths, without_kernel: None) -> None:
    keys = await prepare(device, paths)
    assert await keys.fit(device)
    keys.uuid = "another"
    assert await keys.fit(device)
    # another node may have encrypted it anew
    keys.look_again()
    assert not await keys.fit(device)
    assert keys.volume_key is None
