"""What may be said about encryption, and what is done with a device: pure."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from share_manager.encryption import (
    MAX_PASSPHRASE,
    Encryption,
    LuksOptions,
    LuksParameters,
    Passphrase,
    from_line,
    load,
    merge,
    read_secret,
)
from share_manager.errors import (
    HeaderLostError,
    InvalidValueError,
    KeyMissingError,
    NotEncryptedError,
    PassphraseError,
)
from share_manager.paths import VolumePaths
from share_manager.share.cryptsetup import Kdf, Keyslot, VolumeKey, path_of, piped
from share_manager.share.daemon import ServeOptions
from share_manager.share.luks import Header, Verdict, costliest, decide, read_header, write_header
from share_manager.share.mapping import mapping_name
from share_manager.share.requests import ChangePassphrase

KEY = Passphrase(b"correct horse")


def test_the_defaults_are_those_of_longhorn() -> None:
    assert merge() == LuksParameters(
        cipher="aes-xts-plain64", digest="sha256", key_size=256, pbkdf="argon2i", pbkdf_memory=64 << 20
    )


def test_a_secret_as_longhorn_takes_it() -> None:
    passphrase, said = read_secret(
        {
            "CRYPTO_KEY_VALUE": b"a\nb\n",
            "CRYPTO_KEY_PROVIDER": b"secret",
            "CRYPTO_KEY_CIPHER": b"aes-xts-plain64",
            "CRYPTO_KEY_HASH": b"sha512\n",
            "CRYPTO_KEY_SIZE": b"512",
            "CRYPTO_PBKDF": b"argon2id",
            "SOMETHING": b"\xff",
        },
        "secret",
    )
    # a value is what it is, line ends too
    assert passphrase.reveal() == b"a\nb\n"
    assert merge(said) == LuksParameters(digest="sha512", key_size=512, pbkdf="argon2id")
    # what was said on the command line wins
    assert merge(said, LuksOptions(key_size=256)).key_size == 256


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no key CRYPTO_KEY_VALUE"),
        ({"CRYPTO_KEY_VALUE": b""}, "empty"),
        ({"CRYPTO_KEY_VALUE": b"x" * (MAX_PASSPHRASE + 1)}, "longer than"),
        ({"CRYPTO_KEY_VALUE": b"x", "CRYPTO_KEY_PROVIDER": b"vault"}, "'vault'"),
        ({"CRYPTO_KEY_VALUE": b"x", "CRYPTO_KEY_SIZE": b"many"}, "no number of bits"),
        ({"CRYPTO_KEY_VALUE": b"x", "CRYPTO_KEY_HASH": b"\xff"}, "not text"),
    ],
)
def test_a_secret_that_is_none(files: dict[str, bytes], words: str) -> None:
    with pytest.raises(PassphraseError, match=words):
        read_secret(files, "secret")


@pytest.mark.parametrize(
    "said",
    [
        LuksOptions(cipher="aes xts"),
        LuksOptions(cipher="--help"),
        LuksOptions(digest=""),
        LuksOptions(key_size=100),
        LuksOptions(pbkdf="scrypt"),
        LuksOptions(pbkdf_memory=4096),
        LuksOptions(pbkdf_time=1),
    ],
)
def test_parameters_that_make_no_sense(said: LuksOptions) -> None:
    with pytest.raises(InvalidValueError):
        merge(said)


@given(st.binary(min_size=1, max_size=200))
def test_a_passphrase_never_shows(value: bytes) -> None:
    secret = b"<" + value.hex().encode() + b">"
    passphrase = Passphrase(secret)
    options = ServeOptions(encryption=Encryption(wanted=True, passphrase=passphrase))
    shown = f"{passphrase} {passphrase!r} {options} {VolumeKey(secret)!r} {ChangePassphrase(old=secret, new=secret)!r}"
    assert secret.decode() not in shown


@given(st.binary(min_size=2, max_size=300))
def test_one_line_end_is_not_part_of_a_file(content: bytes) -> None:
    assert from_line(content + b"\n", "file").reveal() == content
    if not content.endswith(b"\n"):
        assert from_line(content, "file").reveal() == content


def test_where_a_passphrase_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "passphrase"
    file.write_bytes(b"one\n")
    assert load(str(file))[0].reveal() == b"one"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "CRYPTO_KEY_VALUE").write_bytes(b"two\n")
    (secret / "CRYPTO_PBKDF").write_bytes(b"pbkdf2")
    assert load(str(secret)) == (Passphrase(b"two\n"), LuksOptions(pbkdf="pbkdf2"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"three\n")))
    assert load("-")[0].reveal() == b"three"
    for source in (str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(PassphraseError):
            load(source)


def test_a_pipe_holds_the_longest_passphrase() -> None:
    longest = Passphrase(b"x" * MAX_PASSPHRASE)
    with piped(longest, KEY) as fds:
        assert [len(Path(path_of(fd)).read_bytes()) for fd in fds] == [MAX_PASSPHRASE, len(KEY.reveal())]


UNFINISHED, FINISHED = Header(uuid="u", finished=False), Header(uuid="u", finished=True)


@pytest.mark.parametrize("known", [None, UNFINISHED, FINISHED], ids=["unknown", "unfinished", "finished"])
@pytest.mark.parametrize(("luks", "empty"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("wanted", "key"), [(False, None), (False, KEY), (True, KEY)])
def test_what_is_done_with_a_device(
    known: Header | None, luks: bool, empty: bool, wanted: bool, key: Passphrase | None
) -> None:
    asked = Encryption(wanted=wanted, passphrase=key)
    verdict: Verdict | type[Exception]
    try:
        verdict = decide("v", asked, known, luks=luks, empty=empty)
    except (KeyMissingError, NotEncryptedError, HeaderLostError) as error:
        verdict = type(error)
    # a header is only ever made where nothing can be lost, and never without being asked
    if verdict is Verdict.FORMAT:
        assert key is not None
        assert (known is UNFINISHED) or (wanted and empty and not luks and known is None)
    # nothing that is, was, or is to be encrypted is taken for plain
    if verdict is Verdict.PLAIN:
        assert (luks, known, key) == (False, None, None)
    if verdict is Verdict.UNLOCK:
        assert luks
    if luks and key is None:
        assert verdict is KeyMissingError
    if known is FINISHED and not luks:
        assert verdict is HeaderLostError
    if key is not None and not luks and known is None and not (wanted and empty):
        assert verdict is NotEncryptedError
    # everything that can go on does
    if luks and key is not None:
        assert isinstance(verdict, Verdict)


def test_what_is_kept_beside_the_record(tmp_path: Path) -> None:
    paths = VolumePaths(tmp_path, "v")
    paths.directory.mkdir(parents=True)
    assert read_header(paths) is None
    write_header(paths, UNFINISHED)
    assert paths.encryption.read_bytes() == b'{"uuid":"u","finished":false}'
    assert read_header(paths) == UNFINISHED
    assert paths.encryption.stat().st_mode & 0o777 == 0o600
    # damaged it still says that the volume is encrypted, and that there is something to lose
    paths.encryption.write_bytes(b"{")
    found = read_header(paths)
    assert found is not None
    assert found.finished


def test_a_new_passphrase_costs_no_less_than_the_costliest() -> None:
    cheap = Keyslot(kdf=Kdf(type="pbkdf2", iterations=1000))
    dear = Keyslot(kdf=Kdf(type="argon2i", time=4, memory=65536, cpus=2))
    for order in itertools.permutations({"0": cheap, "1": dear}.items()):
        assert costliest(dict(order)) == dear.kdf


def test_the_longest_name_fits_device_mapper(tmp_path: Path) -> None:
    assert len(mapping_name(VolumePaths(tmp_path, "v" * 63), 10**12)) < 128
