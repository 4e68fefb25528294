"""What a user may say of encryption, to `serve` as to `share`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from share_manager import units
from share_manager.encryption import Encryption, LuksOptions, load, merge
from share_manager.errors import UsageError

Encrypt = Annotated[
    bool, Parameter(negative=(), help="Encrypt a new volume with LUKS2; an existing one must be encrypted.")
]
PassphraseFile = Annotated[
    str | None,
    Parameter(
        allow_leading_hyphen=True,
        help="File with the passphrase, directory of a mounted Secret (CRYPTO_KEY_VALUE), or - for stdin.",
    ),
]
LuksCipher = Annotated[str | None, Parameter(help="Cipher of a new encrypted volume (aes-xts-plain64).")]
LuksHash = Annotated[str | None, Parameter(help="Hash of its header (sha256).")]
LuksKeySize = Annotated[int | None, Parameter(help="Bits of its key (256).")]
LuksPbkdf = Annotated[str | None, Parameter(help="How its key is derived: argon2i, argon2id or pbkdf2 (argon2i).")]
LuksPbkdfMemory = Annotated[
    str | None, Parameter(help="Memory that each derivation needs at most, in Ki, Mi or Gi (64Mi).")
]
LuksPbkdfTime = Annotated[int | None, Parameter(help="Milliseconds that a derivation takes on this machine (2000).")]
AllowDiscards = Annotated[
    bool,
    Parameter(negative=(), help="Give freed space of an encrypted volume back, which shows what is in use."),
]


def encryption_options(
    *,
    encrypt: bool,
    passphrase_file: str | None,
    luks_cipher: str | None,
    luks_hash: str | None,
    luks_key_size: int | None,
    luks_pbkdf: str | None,
    luks_pbkdf_memory: str | None,
    luks_pbkdf_time: int | None,
    allow_discards: bool,
) -> Encryption:
    """Raises UsageError, InvalidValueError, PassphraseError."""
    memory = None if luks_pbkdf_memory is None else units.parse_size(luks_pbkdf_memory, "--luks-pbkdf-memory")
    said = LuksOptions(
        cipher=luks_cipher,
        digest=luks_hash,
        key_size=luks_key_size,
        pbkdf=luks_pbkdf,
        pbkdf_memory=memory,
        pbkdf_time=luks_pbkdf_time,
    )
    if passphrase_file is None:
        if encrypt:
            raise UsageError("--encrypt needs the passphrase: give it with --passphrase-file FILE, or - for stdin")
        if said != LuksOptions():
            raise UsageError("the --luks options are for a new encrypted volume: add --encrypt and --passphrase-file")
        return Encryption()
    merge(said)
    passphrase, of_secret = load(passphrase_file)
    return Encryption(
        wanted=encrypt,
        passphrase=passphrase,
        source=passphrase_file,
        parameters=merge(of_secret, said),
        discards=allow_discards,
    )
