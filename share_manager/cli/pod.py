"""`share-manager pod`: what runs in the pods that the manifests and the controller make."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import trio
from cyclopts import App, Parameter

from engine import logs
from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Node, Steps, VolumeName, reporter
from share_manager.cli.controller import Kubeconfig, Namespace
from share_manager.controllers.pod import CLUSTER_SECRET_DIR, METRICS_PORT
from share_manager.encryption import Encryption, LuksOptions, load, merge
from share_manager.errors import UsageError
from share_manager.events import Reporter
from share_manager.kube.access import Access, find_access
from share_manager.kube.client import Client
from share_manager.kube.records import StorePlace
from share_manager.kube.resources import Volume
from share_manager.paths import VolumePaths
from share_manager.pods.agent import Agent, AgentOptions
from share_manager.pods.allowed import LOOPBACK, Allowed
from share_manager.pods.home import SECRET_NAME, PodHome, PodOptions
from share_manager.share.daemon import ServeOptions, Share
from share_manager.share.export import ExportOptions
from share_manager.share.filesystem import FilesystemOptions
from share_manager.share.home import Tenant
from share_manager.share.network import NetworkMode, NetworkOptions
from share_manager.share.requests import AllowClients
from share_manager.share.right import RightOptions
from share_manager.share.session import require_root
from share_manager.volumes import make_data_dir

app = App(name="pod", help="What runs in share-manager's pods; the controller and the manifests start these.")

Secret = Annotated[Path, Parameter(name="--secret-file", help="File with the secret that all nodes share.")]
_SECRET = Path(CLUSTER_SECRET_DIR, SECRET_NAME)


@app.command(name="node")
def node_command(
    *,
    node: Node,
    address: Annotated[str, Parameter(help="Address of this host at which other nodes reach its replicas.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    secret_file: Secret = _SECRET,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
    output: Steps = "text",
) -> None:
    """Serve the replicas of this node, and say that it is alive, until SIGTERM.

    For example:

    share-manager pod node --node worker-1 --address 192.0.2.11
    """
    logs.configure(process="node")
    require_root("pod node")
    access = find_access(kubeconfig)
    options = AgentOptions(
        node=node,
        address=units.parse_address(address),
        data_dir=make_data_dir(data_dir),
        cluster_secret=secret_file,
    )
    trio.run(_node, access, namespace, options, reporter(output))


async def _node(access: Access, namespace: str, options: AgentOptions, report: Reporter) -> None:
    async with Client(access, namespace=namespace) as client:
        await Agent(client, options, report).run()


@app.command(name="share")
def share_command(
    volume: VolumeName,
    /,
    *,
    instance: Annotated[str, Parameter(help="Label of this pod alone; the controller gave it the volume.")],
    node: Node,
    passphrase_file: Annotated[
        str | None, Parameter(help="Directory of a mounted Secret with the passphrase of an encrypted volume.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    secret_file: Secret = _SECRET,
    kubeconfig: Kubeconfig = None,
    namespace: Namespace = "",
    bind: Annotated[str, Parameter(help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[int, Parameter(help="TCP port of the NFS server.")] = 2049,
    metrics_port: Annotated[int, Parameter(help="Port for /metrics, /healthz and /readyz; 0: none.")] = METRICS_PORT,
    network: Annotated[
        NetworkMode, Parameter(help="here: this network namespace is the share's. host: it is left as it is.")
    ] = "here",
    output: Steps = "text",
) -> None:
    """Serve a volume in its pod. Its Volume says how.

    For example:

    share-manager pod share vol1 --instance x7k2m9p4qd --node worker-1
    """
    logs.configure(process="share-manager")
    units.parse_name(volume)
    require_root("pod share")
    access = find_access(kubeconfig)
    place = StorePlace(
        namespace=namespace or access.namespace,
        holder=instance,
        kubeconfig=str(kubeconfig.absolute()) if kubeconfig is not None else "",
    )
    options = PodOptions(instance=instance, node=node, place=place, cluster_secret=secret_file, port=port)
    where = ExportOptions(bind=units.parse_address(bind), port=units.parse_port(port))
    trio.run(
        partial(
            _share,
            access,
            VolumePaths(make_data_dir(data_dir), volume),
            options,
            where,
            NetworkOptions(mode=network),
            metrics_port,
            passphrase_file,
            reporter(output),
        )
    )


async def _share(
    access: Access,
    paths: VolumePaths,
    options: PodOptions,
    where: ExportOptions,
    network: NetworkOptions,
    metrics_port: int,
    passphrase_file: str | None,
    report: Reporter,
) -> None:
    async with Client(access, namespace=options.place.namespace) as client:
        volume = await client.get(Volume, paths.volume)
        serve = serve_options(volume, where, network, metrics_port, passphrase_file)
        share: Share

        async def beside(_: Tenant) -> None:
            async def change(networks: tuple[str, ...]) -> None:
                await share.allow(AllowClients(networks=networks))

            await Allowed(client, volume, change).run()

        share = Share(paths, serve, report, PodHome(paths, client, options, beside))
        await share.run()


def serve_options(
    volume: Volume, where: ExportOptions, network: NetworkOptions, metrics_port: int, passphrase_file: str | None
) -> ServeOptions:
    """What a Volume says of its share. Raises UsageError, PassphraseError."""
    spec = volume.spec
    encryption = Encryption()
    if spec.encrypted:
        if passphrase_file is None:
            raise UsageError(f"volume {volume.name} is encrypted: its ShareManager has no spec.passphraseSecret")
        passphrase, of_secret = load(passphrase_file)
        said = LuksOptions(
            cipher=spec.encryption.cipher,
            digest=spec.encryption.hash,
            key_size=spec.encryption.key_size,
            pbkdf=spec.encryption.pbkdf,
        )
        encryption = Encryption(
            wanted=True,
            passphrase=passphrase,
            # what the Secret says counts more, as it does for operators of Longhorn
            parameters=merge(said, of_secret),
            discards=spec.encryption.allow_discards,
        )
    return ServeOptions(
        encryption=encryption,
        filesystem=FilesystemOptions(
            kind=spec.filesystem,
            dirsync=spec.dirsync,
            root_owner=(spec.export.root_uid, spec.export.root_gid),
            root_mode=int(spec.export.root_mode, 8),
        ),
        export=ExportOptions(
            bind=where.bind,
            port=where.port,
            # until it is known who may: nobody but this machine
            allow=LOOPBACK,
            squash=spec.export.squash,
            read_only=spec.export.read_only,
            lease_lifetime=spec.export.lease_lifetime,
            grace_period=max(spec.export.grace_period, spec.export.lease_lifetime),
        ),
        network=network,
        right=RightOptions(ungated=network.mode == "host"),
        alone=False,
        metrics_port=metrics_port,
    )
