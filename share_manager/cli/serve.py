"""`share-manager serve`: from a name to an NFS export, in one process tree."""

from __future__ import annotations

from typing import Annotated, Literal

import trio
from cyclopts import Parameter

from engine.frontend import DEFAULT_FRONTEND
from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Frontend, Steps, VolumeName, reporter, terminal
from share_manager.errors import InvalidValueError
from share_manager.paths import VolumePaths
from share_manager.share.daemon import ServeOptions, Share
from share_manager.share.export import ExportOptions
from share_manager.share.filesystem import FilesystemOptions
from share_manager.share.formatting import DEFAULT_KIND
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
    bind: Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 or :: for all.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="TCP port of the NFS server.")] = 2049,
    fs: Annotated[
        Literal["ext4", "xfs"] | None,
        Parameter(help="Filesystem of a new volume (ext4); an existing one must have it."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True, negative=(), help="Networks whose clients may mount; everyone when not given."
        ),
    ] = None,
    squash: Annotated[
        Literal["none", "root", "all"], Parameter(help="Which users become nobody (65534): none, root, or all.")
    ] = "none",
    read_only: Annotated[bool, Parameter(negative=(), help="Let clients only read.")] = False,
    root_owner: Annotated[
        str | None, Parameter(help="UID:GID that own the export's root: 0:0 when new, else as it is.")
    ] = None,
    root_mode: Annotated[
        str | None, Parameter(help="Octal mode of the export's root: 0777 when new, else as it is.")
    ] = None,
    lease_lifetime: Annotated[int, Parameter(help="Seconds that a silent client keeps its locks, 1 to 120.")] = 20,
    grace_period: Annotated[
        int, Parameter(help="Seconds after a restart in which clients reclaim; at least the lease, at most 180.")
    ] = 30,
    frontend: Frontend = DEFAULT_FRONTEND,
    dirsync: Annotated[
        bool,
        Parameter(help="Have created, renamed and removed names on disk before the client is answered."),
    ] = True,
    metrics_port: Annotated[
        int, Parameter(help="Port for /metrics, /healthz and /readyz on the --bind address; 0: none.")
    ] = 0,
    output: Steps = "text",
) -> None:
    """Serve a volume over NFSv4 until Ctrl-C or SIGTERM.

    Makes the volume when there is none of that name. Needs root.

    For example:

    share-manager serve vol1

    share-manager serve vol1 --size 100Gi --bind 0.0.0.0 --allow 10.0.0.0/8 --squash root

    share-manager serve vol2 --port 2050 --metrics-port 9500 --output json
    """
    units.parse_name(volume)
    bind = units.parse_address(bind)
    units.parse_port(port)
    units.parse_port(metrics_port, "--metrics-port", least=0)
    if metrics_port == port:
        raise InvalidValueError("--metrics-port", str(metrics_port), "it is the port of the NFS server")
    units.check_grace(lease_lifetime, grace_period)
    wanted = None if size is None else units.parse_size(size, "--size")
    if wanted is not None:
        units.check_size(wanted, fs or DEFAULT_KIND, "--size")
    units.check_replicas(replicas)
    options = ServeOptions(
        volume=VolumeOptions(size=wanted, replicas=replicas, frontend=frontend),
        filesystem=FilesystemOptions(
            kind=fs,
            dirsync=dirsync,
            root_owner=None if root_owner is None else units.parse_owner(root_owner),
            root_mode=None if root_mode is None else units.parse_mode(root_mode),
        ),
        export=ExportOptions(
            bind=bind,
            port=port,
            allow=tuple(units.parse_network(network) for network in allow or ()),
            squash=squash,
            read_only=read_only,
            lease_lifetime=lease_lifetime,
            grace_period=grace_period,
        ),
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
