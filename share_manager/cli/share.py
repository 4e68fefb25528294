"""`share-manager share`: a volume's process on one of several nodes."""

from __future__ import annotations

from typing import Annotated, Literal

import trio
from cyclopts import Parameter

from engine.frontend import DEFAULT_FRONTEND
from share_manager import units
from share_manager.cli.common import (
    DEFAULT_DATA_DIR,
    ClusterSecret,
    DataDir,
    Frontend,
    Node,
    Records,
    Steps,
    VolumeName,
    reporter,
)
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
from share_manager.cluster import open_client
from share_manager.errors import UsageError
from share_manager.node.address import FloatingAddress
from share_manager.paths import VolumePaths
from share_manager.share.daemon import ServeOptions, Share
from share_manager.share.filesystem import FilesystemOptions
from share_manager.share.formatting import DEFAULT_KIND
from share_manager.share.network import NetworkOptions
from share_manager.share.network.namespace import INSIDE
from share_manager.share.node import NodeHome, NodeOptions
from share_manager.share.right import RightOptions
from share_manager.share.session import VolumeOptions, require_root
from share_manager.volumes import make_data_dir


def share(
    volume: VolumeName,
    /,
    *,
    records: Records,
    secret_file: ClusterSecret,
    node: Node,
    standby: Annotated[
        bool, Parameter(negative=(), help="Wait, with everything loaded, while another node serves, and take over.")
    ] = False,
    address: Annotated[
        str | None, Parameter(help="ADDRESS/PREFIX by which clients know the share: it moves to the node that serves.")
    ] = None,
    interface: Annotated[
        str, Parameter(help="Network interface that gets that address; --network own has one of its own.")
    ] = "",
    network: Network = "host",
    bridge: Annotated[str, Parameter(help="With --network own: the bridge that its interface hangs on.")] = "",
    gateway: Gateway = "",
    data_dir: DataDir = DEFAULT_DATA_DIR,
    bind: Bind = "0.0.0.0",
    port: Port = 2049,
    fs: Annotated[Literal["ext4", "xfs"], Parameter(help="Filesystem of a new volume.")] = DEFAULT_KIND,
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
    lease_lifetime: LeaseLifetime = 20,
    grace_period: GracePeriod = 30,
    frontend: Frontend = DEFAULT_FRONTEND,
    dirsync: Dirsync = True,
    metrics_port: MetricsPort = 0,
    output: Steps = "text",
) -> None:
    """Serve a volume that several nodes share, or stand by for it, until Ctrl-C or SIGTERM.

    Its record is on a record server (`share-manager records`), its replicas are hosted by their nodes (`share-manager
    replica serve`). All nodes are given the same options. Ends with status 4 when another node has taken over.

    For example:

    share-manager share vol1 --node a --standby --address 192.0.2.10/24 --interface eth0 \
--records 192.0.2.1:7420 --secret-file /etc/share-manager/secret
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
    floating = _floating(network, address, interface, bridge)
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
    # another node's holder may believe in itself
    right = RightOptions(ungated=True)
    options = ServeOptions(
        volume=VolumeOptions(frontend=frontend),
        encryption=encryption,
        filesystem=FilesystemOptions(kind=fs, dirsync=dirsync),
        export=export,
        network=NetworkOptions(
            mode=network,
            address=address if network == "own" and address is not None else "",
            bridge=bridge,
            gateway=gateway,
            floating=network == "own",
        ),
        right=right,
        alone=False,
        metrics_port=metrics_port,
    )
    placed = NodeOptions(
        node=units.parse_node(node),
        standby=standby,
        address=floating,
        frontend=frontend,
        port=port,
        right_lasts=right.lasts,
    )
    require_root("share")
    report = reporter(output)
    paths = VolumePaths(make_data_dir(data_dir), volume)
    client = open_client(units.parse_records(records), secret_file)
    home = NodeHome(paths, client, secret_file.absolute(), placed, report)
    trio.run(Share(paths, options, report, home).run)


def _floating(network: str, address: str | None, interface: str, bridge: str) -> FloatingAddress | None:
    """Raises UsageError, InvalidValueError."""
    if network == "own":
        if address is None or not bridge:
            raise UsageError("--network own needs --address ADDRESS/PREFIX, and --bridge for its interface to hang on")
        if interface:
            raise UsageError("--network own makes an interface of its own: leave --interface out")
        return FloatingAddress.parse(units.parse_interface(address), INSIDE)
    if bridge:
        raise UsageError("--bridge is for --network own")
    if address is not None and not interface:
        raise UsageError("--address needs --interface, the network interface that is to have it")
    return None if address is None else FloatingAddress.parse(address, interface)
