"""What may be said about encryption: a passphrase that never shows, and the parameters of a new LUKS2 header.

The keys of a Secret are those that operators of Longhorn know, and so are the defaults.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from share_manager.errors import InvalidValueError, PassphraseError

MAX_PASSPHRASE = 8192
"""Bytes; a pipe holds them without anybody reading (65536, pipe(7))."""
HEADER_SIZE = 16 << 20
"""What cryptsetup's LUKS2 header takes of a volume, by default."""
PBKDFS = ("argon2i", "argon2id", "pbkdf2")
_WORD = re.compile(r"[a-z0-9][a-z0-9:_-]{0,63}")
_VALUE = "CRYPTO_KEY_VALUE"
_PROVIDER = "CRYPTO_KEY_PROVIDER"
_KEYS = {
    "CRYPTO_KEY_CIPHER": "cipher",
    "CRYPTO_KEY_HASH": "digest",
    "CRYPTO_KEY_SIZE": "key_size",
    "CRYPTO_PBKDF": "pbkdf",
}


class Passphrase:
    """Bytes that neither an error, a log nor a traceback shows."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes, where: str = "the passphrase") -> None:
        """Raises PassphraseError."""
        if not value:
            raise PassphraseError(where, "it is empty")
        if len(value) > MAX_PASSPHRASE:
            raise PassphraseError(where, f"it is longer than {MAX_PASSPHRASE} bytes")
        self._value = value

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return "Passphrase(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Passphrase) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class LuksParameters(msgspec.Struct, frozen=True, kw_only=True):
    """Of a header that is about to be made. `key_size` in bits, `pbkdf_memory` in bytes, `pbkdf_time` in milliseconds.

    cryptsetup would give argon2 up to 1 GiB, which every later unlocking needs as well, on whatever machine; 64 MiB is
    what RFC 9106 section 4 recommends where memory is scarce.
    """

    cipher: str = "aes-xts-plain64"
    digest: str = "sha256"
    key_size: int = 256
    pbkdf: str = "argon2i"
    pbkdf_memory: int = 64 << 20
    pbkdf_time: int = 2000


class LuksOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What was said on the command line, None where nothing was: that is as the Secret says, or the default."""

    cipher: str | None = None
    digest: str | None = None
    key_size: int | None = None
    pbkdf: str | None = None
    pbkdf_memory: int | None = None
    pbkdf_time: int | None = None


class Encryption(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. `wanted`: encrypt a new volume, and take no other. `source`: where the passphrase is from."""

    wanted: bool = False
    passphrase: Passphrase | None = None
    source: str = ""
    parameters: LuksParameters = LuksParameters()
    discards: bool = False


def check_parameters(found: LuksParameters) -> LuksParameters:
    """Raises InvalidValueError. Which ciphers and hashes there are, cryptsetup and the kernel know."""
    for name, value in (("--luks-cipher", found.cipher), ("--luks-hash", found.digest)):
        if not _WORD.fullmatch(value):
            raise InvalidValueError(name, value, "write it as cryptsetup does, such as aes-xts-plain64 or sha256")
    if found.key_size not in (128, 256, 512):
        raise InvalidValueError("--luks-key-size", str(found.key_size), "128, 256 or 512 bits")
    if found.pbkdf not in PBKDFS:
        raise InvalidValueError("--luks-pbkdf", found.pbkdf, f"one of {', '.join(PBKDFS)}")
    # 32 KiB to 4 GiB: crypt_set_pbkdf_type(3)
    if not 32 << 10 <= found.pbkdf_memory <= 4 << 30:
        raise InvalidValueError("--luks-pbkdf-memory", str(found.pbkdf_memory), "from 32Ki to 4Gi")
    if not 100 <= found.pbkdf_time <= 60_000:
        raise InvalidValueError("--luks-pbkdf-time", str(found.pbkdf_time), "from 100 to 60000 milliseconds")
    return found


def read_secret(files: Mapping[str, bytes], where: str) -> tuple[Passphrase, LuksOptions]:
    """The content of a Secret: its keys, each with its value as it is. Keys that are not ours are left alone.

    Raises PassphraseError.
    """
    if _VALUE not in files:
        raise PassphraseError(where, f"it has no key {_VALUE}")
    provider = _text(files, _PROVIDER, where)
    if provider not in ("", "secret"):
        raise PassphraseError(where, f"{_PROVIDER} is {provider!r}: only 'secret', a passphrase in {_VALUE}, is known")
    said: dict[str, str | int] = {}
    for key, field in _KEYS.items():
        text = _text(files, key, where)
        if field == "key_size" and text:
            if not text.isascii() or not text.isdigit():
                raise PassphraseError(where, f"{key} is {text!r}, which is no number of bits")
            said[field] = int(text)
        elif text:
            said[field] = text
    return Passphrase(files[_VALUE], f"{where}: {_VALUE}"), msgspec.convert(said, LuksOptions)


def _text(files: Mapping[str, bytes], key: str, where: str) -> str:
    try:
        return files.get(key, b"").decode().strip()
    except UnicodeDecodeError:
        raise PassphraseError(where, f"{key} is not text") from None


def merge(*said: LuksOptions) -> LuksParameters:
    """Later ones win. Raises InvalidValueError."""
    values: dict[str, object] = {}
    for options in said:
        values |= {name: value for name, value in msgspec.structs.asdict(options).items() if value is not None}
    return check_parameters(msgspec.convert(values, LuksParameters))


def from_line(content: bytes, where: str) -> Passphrase:
    """A file or what was typed: a last newline is not part of it. Raises PassphraseError."""
    return Passphrase(content[:-1] if content.endswith(b"\n") else content, where)


def reload(source: str, known: Passphrase) -> Passphrase | None:
    """What is there now, if it can be read again and is another one: it may have been changed by another node."""
    if source in ("", "-"):
        return None
    try:
        found, _ = load(source)
    except PassphraseError:
        return None
    return None if found == known else found


def load(source: str) -> tuple[Passphrase, LuksOptions]:
    """From a file, a directory that is a mounted Secret, or with `-` from stdin. Raises PassphraseError."""
    if source == "-":
        return from_line(sys.stdin.buffer.read(MAX_PASSPHRASE + 2), "stdin"), LuksOptions()
    path = Path(source)
    try:
        if path.is_dir():
            wanted = (_VALUE, _PROVIDER, *_KEYS)
            files = {name: _read(path / name) for name in wanted if (path / name).exists()}
            return read_secret(files, source)
        return from_line(_read(path), source), LuksOptions()
    except OSError as error:
        raise PassphraseError(source, error.strerror or os.strerror(error.errno or 0)) from None


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_PASSPHRASE + 2)
