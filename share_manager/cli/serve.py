"""`share-manager serve`: from a name to an NFS export, in one process tree."""

from __future__ import annotations

from typing import Annotated, Literal

import trio
from cyclopts import Parameter

from engine.frontend import DEFAULT_FRONTEND
from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Frontend, Steps, VolumeName, reporter, terminal
from share_manager.cli.encryption import (
    AllowDiscards,
    Encrypt,
    LuksCipher,
    LuksHash,
    LuksKeySize,
    LuksPbkdf,
    LuksPbkdfMemory,
    LuksPbkdfTime,
    PassphraseFile,
    encryption_options,
)
from share_manager.cli.export import (
    Allow,
    Bind,
    Dirsync,
    Gateway,
    GracePeriod,
    LeaseLifetime,
    MetricsPort,
    Network,
    Port,
    ReadOnly,
    Squash,
    export_options,
)
from share_manager.encryption import HEADER_SIZE
from share_manager.errors import InvalidValueError
from share_manager.paths import VolumePaths
from share_manager.share.daemon import ServeOptions, Share
from share_manager.share.filesystem import FilesystemOptions
from share_manager.share.formatting import DEFAULT_KIND
from share_manager.share.network import NetworkOptions
from share_manager.share.session import VolumeOptions, require_root
from share_manager.volumes import make_data_dir


def serve(
    volume: VolumeName,
    /,
    *,
    size: Annotated[
        str | None, Parameter(help="Size of a new volume, in Ki, Mi, Gi or Ti (10Gi); an existing one must have it.")
    ] = None,
    replicas: Annotated[int | None, Parameter(help="Copies of a new volume, 1 to 9 (3).")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    bind: Bind = "127.0.0.1",
    port: Port = 2049,
    fs: Annotated[
        Literal["ext4", "xfs"] | None,
        Parameter(help="Filesystem of a new volume (ext4); an existing one must have it."),
    ] = None,
    encrypt: Encrypt = False,
    passphrase_file: PassphraseFile = None,
    luks_cipher: LuksCipher = None,
    luks_hash: LuksHash = None,
    luks_key_size: LuksKeySize = None,
    luks_pbkdf: LuksPbkdf = None,
    luks_pbkdf_memory: LuksPbkdfMemory = None,
    luks_pbkdf_time: LuksPbkdfTime = None,
    allow_discards: AllowDiscards = False,
    allow: Allow = None,
    squash: Squash = "none",
    read_only: ReadOnly = False,
    root_owner: Annotated[
        str | None, Parameter(help="UID:GID that own the export's root: 0:0 when new, else as it is.")
    ] = None,
    root_mode: Annotated[
        str | None, Parameter(help="Octal mode of the export's root: 0777 when new, else as it is.")
    ] = None,
    lease_lifetime: LeaseLifetime = 20,
    grace_period: GracePeriod = 30,
    frontend: Frontend = DEFAULT_FRONTEND,
    dirsync: Dirsync = True,
    metrics_port: MetricsPort = 0,
    network: Network = "host",
    address: Annotated[
        str, Parameter(help="With --network own: address of the share and its prefix, 10.0.0.5/24.")
    ] = "",
    bridge: Annotated[str, Parameter(help="With --network own: a bridge to hang it on; none: it is routed.")] = "",
    gateway: Gateway = "",
    output: Steps = "text",
) -> None:
    """Serve a volume over NFSv4 until Ctrl-C or SIGTERM.

    Makes the volume when there is none of that name. Needs root.

    For example:

    share-manager serve vol1

    share-manager serve vol1 --size 100Gi --bind 0.0.0.0 --allow 10.0.0.0/8 --squash root

    share-manager serve vault --encrypt --passphrase-file /run/secrets/vault

    share-manager serve vol2 --port 2050 --metrics-port 9500 --output json
    """
    units.parse_name(volume)
    export = export_options(
        bind=bind,
        port=port,
        metrics_port=metrics_port,
        allow=allow,
        squash=squash,
        read_only=read_only,
        lease_lifetime=lease_lifetime,
        grace_period=grace_period,
    )
    if (network == "own") != bool(address):
        raise InvalidValueError("--address", address, "--network own needs one, the others have none")
    if address:
        address = units.parse_interface(address)
    wanted = None if size is None else units.parse_size(size, "--size")
    if wanted is not None:
        units.check_size(wanted, fs or DEFAULT_KIND, "--size", header=HEADER_SIZE if encrypt else 0)
    units.check_replicas(replicas)
    encryption = encryption_options(
        encrypt=encrypt,
        passphrase_file=passphrase_file,
        luks_cipher=luks_cipher,
        luks_hash=luks_hash,
        luks_key_size=luks_key_size,
        luks_pbkdf=luks_pbkdf,
        luks_pbkdf_memory=luks_pbkdf_memory,
        luks_pbkdf_time=luks_pbkdf_time,
        allow_discards=allow_discards,
    )
    options = ServeOptions(
        encryption=encryption,
        volume=VolumeOptions(size=wanted, replicas=replicas, frontend=frontend),
        filesystem=FilesystemOptions(
            kind=fs,
            dirsync=dirsync,
            root_owner=None if root_owner is None else units.parse_owner(root_owner),
            root_mode=None if root_mode is None else units.parse_mode(root_mode),
        ),
        export=export,
        network=NetworkOptions(mode=network, address=address, bridge=bridge, gateway=gateway),
        metrics_port=metrics_port,
    )
    require_root("serve")
    console = terminal() if output == "text" else None
    share = Share(VolumePaths(make_data_dir(data_dir), volume), options, reporter(output, console))
    if console is None:
        trio.run(share.run)
        return
    # imported late: most runs have no terminal
    from share_manager.cli.live import LiveView

    trio.run(share.run, LiveView(console).run)
