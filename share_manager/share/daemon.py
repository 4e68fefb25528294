"""The per-volume process: everything from replica servers to the NFS export, in the order of the data path.

Leaving is a cancellation: each block undoes itself, shielded, in reverse order. A failure that needs more than a new
ganesha ends the attachment and everything on it, and the loop in `Share.run` makes the next one.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import trio

from engine.errors import EngineError, FencedError, NoReplicaError, RecordError
from engine.operations import SnapshotCreated
from engine.record import VolumeRecord
from ganesha import GaneshaError
from share_manager import units
from share_manager.encryption import HEADER_SIZE, Encryption, Passphrase
from share_manager.errors import (
    CannotUpgradeError,
    FencedOffError,
    GaveUpError,
    NoReplicaAvailableError,
    NotReadyError,
    RuntimeProblem,
    ShareManagerError,
    leaves,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share import cryptsetup, filesystem, leftovers, operations
from share_manager.share.attachment import Attachment, attach
from share_manager.share.background import Background, background
from share_manager.share.commands import find_program, run
from share_manager.share.connections import KeptConnections
from share_manager.share.control import Handlers, control_socket
from share_manager.share.disk import disk_full, free_bytes, full_disk, is_full, known_free_bytes, watch_disk
from share_manager.share.export import Exporter, ExportOptions, server_config
from share_manager.share.filesystem import FilesystemOptions, Mounted, mounted
from share_manager.share.home import Home, Hostings, LocalHome
from share_manager.share.luks import Keys, Unlocked, read_header, refuse_without_key, save_header, unlocked
from share_manager.share.network import NetworkOptions, ShareNetwork, share_network
from share_manager.share.onvolume import on_volume
from share_manager.share.private import PrivateRoom, image_size, private_room
from share_manager.share.requests import (
    AllowClients,
    BackupHeader,
    ChangePassphrase,
    ClientsAllowed,
    EngineUpgraded,
    HeaderSaved,
    PassphraseChanged,
    ResizeShare,
    ShareResized,
    ShareTrimmed,
    SnapshotShare,
    TrimShare,
    UpgradeEngine,
)
from share_manager.share.right import RightOptions, ServingRight
from share_manager.share.servers import server_handlers
from share_manager.share.session import (
    DEFAULT_REPLICAS,
    DEFAULT_SIZE,
    VolumeOptions,
    check_port,
    clear_leftovers,
    leave_on_signals,
    reachable_host,
    require_root,
    runtime,
    undo_creation,
)
from share_manager.share.snapshot import located, metrics_url, nfs_status, replica_infos, used_bytes
from share_manager.share.snapshots import take_snapshot
from share_manager.share.state import StateFile
from share_manager.share.status import (
    GaneshaInfo,
    ProcessInfo,
    Restarts,
    ShareStatus,
    engine_info,
)
from share_manager.share.supervise import Backoff, Policy
from share_manager.share.warm import WarmEngine, warm_up
from share_manager.volumes import volume_lock

REPAIRABLE = (ShareManagerError, EngineError, GaneshaError, OSError)
AWAY = (NoReplicaAvailableError, NoReplicaError, RecordError)
SERVE_PROGRAMS = (
    "losetup",
    "blkid",
    "mount",
    "umount",
    "mkfs.ext4",
    "e2fsck",
    "resize2fs",
    "ganesha.nfsd",
    "dbus-daemon",
)
_EMPTY_FILESYSTEM = 8 << 20
_TOLD_WAIT = 0.5
SPARE_AFTER = 5.0


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`alone`: the volume's lock keeps everybody else away, so nobody's right to serve has to be waited for."""

    volume: VolumeOptions = VolumeOptions()
    encryption: Encryption = Encryption()
    filesystem: FilesystemOptions = FilesystemOptions()
    export: ExportOptions = ExportOptions()
    network: NetworkOptions = NetworkOptions()
    right: RightOptions = RightOptions()
    alone: bool = True
    metrics_port: int = 0
    policy: Policy = Policy()


class Share:
    """One served volume. `run` is its life; everything else looks at it from outside."""

    def __init__(self, paths: VolumePaths, options: ServeOptions, report: Reporter, home: Home | None = None) -> None:
        """`home`: where record and replicas are; this machine when not given."""
        self.paths = paths
        self.home = home or LocalHome(paths)
        self.options = options
        self.report = report
        self.state = "starting"
        self.started_at = time.time()
        self.repairs = 0
        self.resumes = 0
        self.last_failure = ""
        self.record: VolumeRecord | None = None
        self.attachment: Attachment | None = None
        self.keys = Keys(options.encryption)
        self.unlocked: Unlocked | None = None
        self.mounted: Mounted | None = None
        self.exporter: Exporter | None = None
        self.replicas: Hostings | None = None
        self.network: ShareNetwork | None = None
        self.right: ServingRight | None = None
        self.allowed = options.export.allow
        self.ganesha_restarts = 0
        self.phases: dict[str, float] = {}
        self._was_ready = False
        self._served = -1
        self._spare: WarmEngine | None = None
        self._kept = KeptConnections(options.export.port)
        self._beside: Background
        self._operating = trio.Lock()
        self._handlers: Handlers = {
            ResizeShare: self._resize,
            TrimShare: self._trim,
            SnapshotShare: self._snapshot,
            UpgradeEngine: self._upgrade,
            ChangePassphrase: self._change_passphrase,
            BackupHeader: self._backup_header,
            AllowClients: self.allow,
            **server_handlers(paths.volume, lambda: self.replicas),
        }
        export = self.export = options.export
        own = options.network.address.partition("/")[0]
        if own and not options.network.floating:
            # one that comes and goes is not there yet, and nothing else is in that namespace
            export = self.export = msgspec.structs.replace(export, bind=own)
        self.host = own or reachable_host(export.bind)
        self.endpoint = units.endpoint(self.host, export.port, paths.volume)
        self.mount_command = units.mount_command(self.host, export.port, paths.volume)

    async def run(self, beside: Callable[[Share], Awaitable[None]] | None = None) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP. `beside` runs along, such as a live view.

        Raises ShareManagerError, EngineError, GaneshaError, OSError; nothing half-made is left then.
        """
        require_root(self.home.kind)
        programs = list(SERVE_PROGRAMS)
        if self.options.filesystem.kind == "xfs":
            programs += ["mkfs.xfs", "xfs_growfs"]
        encryption = self.options.encryption
        if encryption.passphrase is not None:
            programs += ["cryptsetup", "dmsetup"]
        if self.options.network.mode == "own":
            programs += ["ip", "nsenter"]
        if self.home.kind == "share":
            programs.append("setpriv")
        for program in programs:
            find_program(program)
        if encryption.passphrase is not None:
            await cryptsetup.require_dm_crypt()
            # a dump of this process's memory would have the key
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with volume_lock(self.paths, "first"):
            async with leave_on_signals(self.report, self._leaving), self._network() as self.network:
                if self.home.kind == "serve" and not self.paths.directory.exists():
                    self._check_space()
                self.record, made = await self.home.open(self.options.volume, self.report)
                try:
                    refuse_without_key(self.paths, encryption)
                    await self._run(beside)
                except BaseException as caught:
                    if made and not self._was_ready:
                        full = is_full(self.paths.data_dir)
                        undo_creation(self.paths)
                        if full and not isinstance(caught, trio.Cancelled):
                            raise disk_full(self.paths.data_dir) from caught
                    raise
            self.report.emit("stopped", "stopped", volume=self.paths.volume)

    @contextlib.asynccontextmanager
    async def _network(self) -> AsyncIterator[ShareNetwork]:
        """The share's network, with nobody else on its ports."""
        # what a killed run left is silenced before it is asked to leave, and may be what has the port
        orphaned = not leftovers.observe(self.paths).empty
        if not orphaned:
            self._check_ports()
        async with share_network(
            self.options.network,
            volume=self.paths.volume,
            port=self.export.port,
            allowed=self.allowed,
            apply_allowed=self._tell_ganesha,
        ) as network:
            await clear_leftovers(self.paths, self.report)
            if orphaned:
                self._check_ports()
            yield network

    def _check_ports(self) -> None:
        """Raises PortInUseError, AddressError."""
        if self.options.network.mode != "own":
            check_port(self.export.bind, self.export.port)
        if self.options.metrics_port:
            check_port(self.options.export.bind, self.options.metrics_port, "--metrics-port")

    def _check_space(self) -> None:
        """Raises DiskError when a new volume does not even have room for its empty filesystem."""
        volume = self.options.volume
        need = image_size(volume.size or DEFAULT_SIZE) + _EMPTY_FILESYSTEM
        need += HEADER_SIZE if self.options.encryption.wanted else 0
        if free_bytes(self.paths.data_dir) < need * (volume.replicas or DEFAULT_REPLICAS):
            raise disk_full(self.paths.data_dir)

    async def _run(self, beside: Callable[[Share], Awaitable[None]] | None) -> None:
        assert self.record is not None
        async with (
            runtime(self.paths, self.home.kind) as state,
            control_socket(self.paths.control, self.status, self._handlers) as answer,
            background() as tasks,
        ):
            tasks.start_soon(answer)
            tasks.start_soon(watch_disk, self.paths.data_dir, self.report)
            if self.options.metrics_port:
                # imported late: most runs have no use for a web server
                from share_manager.metrics import serve_metrics

                tasks.start_soon(serve_metrics, self.status, self.options.export.bind, self.options.metrics_port)
            if beside is not None:
                tasks.start_soon(beside, self)
            async with self.home.replicas(self.record, self.report, state) as self.replicas:
                assert self.network is not None
                if self.options.network.mode == "here":
                    state.update(gate_port=self.export.port)
                self.right = ServingRight(self.network, self.options.right, self.report)
                await self.home.tenure(self, state, partial(self._attachments, state))

    def _leaving(self) -> None:
        self.state = "stopping"

    def begin(self) -> None:
        """Serve as if for the first time: what fails now may do better elsewhere."""
        self._was_ready = False
        self.keys.look_again()
        if self.state != "stopping":
            self.state = "starting"

    @property
    def needs_header(self) -> bool:
        return self.keys.passphrase is not None and self.keys.volume_key is None

    async def header(self) -> bytes:
        unlocked = self.unlocked
        if unlocked is None or not unlocked.encrypted:
            return b""
        try:
            return await on_volume(cryptsetup.read_area, unlocked.below)
        except OSError:
            return b""

    async def learn(self, header: bytes) -> None:
        file = self.paths.run / "header"
        try:
            await trio.to_thread.run_sync(cryptsetup.write_area, file, header)
            await self.keys.derive(str(file))
        except (ShareManagerError, OSError) as error:
            self.report.warn("cannot_unlock", f"this node could not take over: {error}", reason=str(error))
        finally:
            file.unlink(missing_ok=True)

    async def _attachments(self, state: StateFile) -> None:
        """One attachment after the other, until cancelled."""
        try:
            async with background() as self._beside:
                await self._one_after_the_other(state)
        finally:
            self._kept.close()
            spare, self._spare = self._spare, None
            if spare is not None:
                with trio.CancelScope(shield=True):
                    await spare.abandon()

    async def _one_after_the_other(self, state: StateFile) -> None:
        policy = self.options.policy
        backoff = Backoff(stable_after=policy.stable_after)
        while True:
            try:
                reason, patient = await self._attachment(state), False
                if not self._was_ready:
                    raise RuntimeProblem(reason)
            except BaseException as caught:
                error = _repairable(caught)
                if error is None or not self._was_ready:
                    raise
                reason, patient = str(error), isinstance(error, AWAY)
            full = full_disk([self.paths.data_dir, *(Path(server.record.directory) for server in self.replicas or ())])
            if full is not None:
                reason, patient = f"{reason}; {disk_full(full)}", True
            self.state = "repairing"
            self.last_failure = reason
            pause = backoff.failed(trio.current_time())
            # replicas and a record server that are away come back, and somebody frees the disk: that is waited for
            if backoff.quick_failures >= policy.give_up_after and not patient:
                raise GaveUpError(backoff.quick_failures, reason)
            again = f" in {pause:.1f} s" if pause else ""
            self.report.warn("repairing", f"{reason}; attaching again{again}", reason=reason)
            await trio.sleep(pause)
            self.repairs += 1

    async def _attachment(self, state: StateFile) -> str:
        """One attachment, from claiming its epoch to its end; why it ended."""
        assert self.record is not None
        assert self.right is not None
        fs_options = self.options.filesystem
        if self._was_ready:
            # what was asked for once is not forced on what a client has changed since
            fs_options = msgspec.structs.replace(fs_options, root_owner=None, root_mode=None)
        try:
            phase = self._phase()
            async with attach(
                self.paths,
                self.report,
                state,
                self.options.policy,
                frontend=self.options.volume.frontend,
                records=self.home.records,
                warm=self.home.take_warm() or self._take_spare(),
                right_lasts=self.right.lasts,
            ) as attachment:
                attachment.tasks.start_soon(self.right.follow, attachment.client)
                self.attachment = attachment
                phase("attach")
                self.record = attachment.record
                self.report.emit(
                    "attached",
                    f"attached as {attachment.device} (epoch {attachment.epoch})",
                    device=attachment.device,
                    block_file=str(self.paths.block_file),
                    epoch=attachment.epoch,
                )
                await self.home.before_mount()
                async with (
                    unlocked(
                        attachment.device,
                        self.paths,
                        attachment.epoch,
                        self.options.encryption,
                        self.keys,
                        self.report,
                        attachment.break_off,
                    ) as self.unlocked,
                    mounted(
                        self.unlocked.device,
                        volume=self.paths.volume,
                        volume_uuid=self.record.uuid,
                        marker=self.paths.formatting,
                        inherited=self.paths.inherited_uuids,
                        target=self.paths.mountpoint,
                        options=fs_options,
                        report=self.report,
                        give_up=attachment.break_off,
                    ) as self.mounted,
                    private_room(
                        self.paths.mountpoint,
                        self.record.size,
                        self.report,
                        self.paths.drop_recovery,
                        lambda device: state.update(private_device=device),
                        attachment.break_off,
                    ) as room,
                ):
                    phase("mount")
                    await self._export(attachment, self.mounted, room, state)
            if attachment.fenced is not None:
                raise attachment.fenced
            return attachment.broken or "the attachment ended"
        finally:
            if self.attachment is not None:
                self.resumes += len(self.attachment.resumed)
            self.attachment = self.unlocked = self.mounted = None

    def _take_spare(self) -> WarmEngine | None:
        spare, self._spare = self._spare, None
        return spare if spare is not None and spare.usable else None

    async def _keep_spare(self, attachment: Attachment, state: StateFile) -> None:
        """Where a dead engine cannot be replaced under its file, the next attachment's engine waits, loaded."""
        # starting it takes what clients that come back need more urgently
        await trio.sleep(SPARE_AFTER)
        await attachment.refresh()
        resumable = attachment.status is None or attachment.status.resumable
        if resumable or attachment is not self.attachment or self._spare is not None:
            return
        assert self.right is not None
        frontend, lasts = self.options.volume.frontend, self.right.lasts
        try:
            self._spare = await warm_up(
                self.paths, self.home.records, attachment.record, self.report, state, frontend, lasts, self._beside
            )
        except (ShareManagerError, EngineError, OSError) as error:
            self.report.warn("not_warm", f"the engine that was to stand by did not start: {error}")
        if self._spare is not None:
            self.report.emit("spare_ready", "another engine waits, for when this one dies")

    async def _may_serve(self, attachment: Attachment, right: ServingRight, granted: trio.Event) -> None:
        """Wait until nobody else can serve any more."""
        phase = self._phase()
        await self.home.may_export()
        # of what we served ourselves nothing is left: its port is silent and its server dead
        ours = self.options.alone or attachment.epoch == self._served + 1
        waited = await right.free(ours=ours)
        if waited > _TOLD_WAIT:
            self.report.emit("right_awaited", f"waited {waited:.1f} s for the right to serve", seconds=waited)
        phase("right to serve")
        granted.set()

    async def _export(self, attachment: Attachment, on: Mounted, room: PrivateRoom, state: StateFile) -> None:
        assert self.record is not None
        assert self.right is not None
        # behind a gate all clients have one address, and those that are not allowed do not get there
        export = msgspec.structs.replace(self.export, allow=() if self.right.network.gated else self.allowed)
        config = server_config(export, self.paths.volume, self.record.uuid, on.data, room.recovery_root)
        home, policy = self.home, self.options.policy
        exporter = Exporter(
            config,
            self.paths,
            self.report,
            state,
            policy,
            self.right,
            self._kept,
            home.silence,
            home.drain,
            home.lifeline,
        )
        exporter.restarts = self.ganesha_restarts
        self.exporter = exporter
        self.report.emit("exporting", f"exporting /{self.paths.volume}", path=str(on.data))
        await self.home.before_export(room.recovery_root)

        phase = self._phase()

        async def ready() -> None:
            phase("export")
            self.home.exported(attachment.epoch)
            self._ready(attachment, exporter, state)

        def lost() -> None:
            self.ganesha_restarts = exporter.restarts
            if self.state == "running":
                self.state = "repairing"

        granted = trio.Event()
        try:
            async with background() as beside:
                beside.start_soon(self._may_serve, attachment, self.right, granted)
                await exporter.run(attachment, on, room, granted, ready, lost)
        finally:
            self.exporter = None

    def _phase(self) -> Callable[[str], None]:
        """Notes how long it was since the last note."""
        before = trio.current_time()

        def done(name: str) -> None:
            nonlocal before
            self.phases[name], before = round(trio.current_time() - before, 3), trio.current_time()

        return done

    def _ready(self, attachment: Attachment, exporter: Exporter, state: StateFile) -> None:
        if self.state != "stopping":
            self.state = "running"
        state.update(endpoint=self.endpoint)
        if self._served != attachment.epoch:
            self._beside.start_soon(self._keep_spare, attachment, state)
        self._served = attachment.epoch
        again, self._was_ready = self._was_ready, True
        assert self.record is not None
        self.report.emit(
            "ready",
            f"{'serving again' if again else 'ready'}: {self.mount_command}",
            volume=self.paths.volume,
            endpoint=self.endpoint,
            mount=self.mount_command,
            epoch=attachment.epoch,
            size_bytes=self.record.size,
            device=attachment.device,
            mountpoint=str(self.paths.mountpoint),
            repaired=again,
            pid=os.getpid(),
        )

    @contextlib.asynccontextmanager
    async def _at_work(self) -> AsyncIterator[tuple[Attachment, Mounted]]:
        """For what an operator asks, one at a time. Raises NotReadyError."""
        async with self._operating:
            if self.state != "running" or self.attachment is None or self.mounted is None:
                raise NotReadyError(self.paths.volume, self.state)
            yield self.attachment, self.mounted

    async def _resize(self, request: ResizeShare) -> ShareResized:
        async with self._at_work() as (attachment, on):
            try:
                return await operations.resize(
                    attachment, on, self.paths, request.size, self.report, self.unlocked, self.home.records
                )
            finally:
                self.record = attachment.record

    async def _trim(self, request: TrimShare) -> ShareTrimmed:
        async with self._at_work() as (_, on):
            assert self.record is not None
            assert self.unlocked is not None
            self.unlocked.require_discards()
            return await operations.trim(on, tuple(replica.directory for replica in self.record.replicas))

    async def _snapshot(self, request: SnapshotShare) -> SnapshotCreated:
        async with self._at_work() as (attachment, on):
            made = await take_snapshot(attachment, on, request.name, request.labels)
        self.report.emit("snapshot", f"snapshot {made.name} taken", name=made.name, held_seconds=made.held)
        return made

    async def _change_passphrase(self, request: ChangePassphrase) -> PassphraseChanged:
        async with self._at_work():
            assert self.unlocked is not None
            removed = await self.unlocked.change_passphrase(Passphrase(request.old), Passphrase(request.new))
        self.report.emit("passphrase_changed", "the volume has another passphrase", key_slots_removed=removed)
        return PassphraseChanged(removed=removed)

    async def _backup_header(self, request: BackupHeader) -> HeaderSaved:
        async with self._at_work() as (attachment, _):
            return HeaderSaved(uuid=await save_header(attachment.device, self.paths, Path(request.path)))

    async def allow(self, request: AllowClients) -> ClientsAllowed:
        async with self._operating:
            if self.network is None:
                raise NotReadyError(self.paths.volume, self.state)
            await self.network.set_allowed(request.networks)
            self.allowed = request.networks
        who = ", ".join(request.networks) or "everyone"
        self.report.emit("allowed", f"clients that may use it: {who}", networks=list(request.networks))
        return ClientsAllowed(networks=self.allowed)

    async def _tell_ganesha(self, networks: Sequence[str]) -> None:
        if self.exporter is not None:
            await self.exporter.set_allowed(networks)

    async def _upgrade(self, request: UpgradeEngine) -> EngineUpgraded:
        async with self._at_work() as (attachment, on):
            before = attachment.engine.pid
            try:
                done = await attachment.upgrade()
            except CannotUpgradeError:
                if not request.reattach:
                    raise
            else:
                operations.tell_upgraded(done, self.report)
                return done
            # what the page cache has goes with the mount: leave it little
            await run("sync", "--file-system", str(on.root), timeout=filesystem.UNMOUNT_TIMEOUT)
            attachment.break_off("another engine was asked for")
            while self.attachment is attachment or self.state != "running" or self.attachment is None:  # noqa: ASYNC110
                await trio.sleep(0.05)
            return EngineUpgraded(pid=self.attachment.engine.pid, before=before, incarnation=1)

    async def status(self) -> ShareStatus:
        record, attachment, mounted_fs, exporter = self.record, self.attachment, self.mounted, self.exporter
        server = exporter.server if exporter else None
        if attachment is not None:
            await attachment.refresh()
        engine = attachment.engine if attachment is not None and attachment.engine.returncode is None else None
        nfs = await nfs_status(server)
        return ShareStatus(
            volume=self.paths.volume,
            state=self.state,
            kind=self.home.kind,
            endpoint=self.endpoint,
            mount_command=self.mount_command,
            uuid=record.uuid if record else "",
            epoch=attachment.epoch if attachment else (record.epoch if record else 0),
            size_bytes=record.size if record else 0,
            filesystem=mounted_fs.kind if mounted_fs else None,
            encrypted=self.unlocked.encrypted if self.unlocked else read_header(self.paths) is not None,
            used_bytes=used_bytes(mounted_fs.root) if mounted_fs else None,
            in_grace=nfs.in_grace,
            grace_ends_at=nfs.grace_ends_at,
            clients=located(nfs.clients, self.network, self.export.lease_lifetime) if self.network else nfs.clients,
            allow=self.allowed,
            network=self.options.network.mode,
            right_held=self.right.held if self.right is not None and self.right.needed else None,
            share_manager=ProcessInfo(pid=os.getpid()),
            engine=engine_info(
                attachment.status if attachment else None, engine.pid if engine else None, str(self.paths.block_file)
            ),
            device=attachment.device or None if attachment else None,
            mountpoint=str(mounted_fs.root) if mounted_fs else None,
            ganesha=GaneshaInfo(pid=server.pid if server else None, epoch=exporter.epoch if exporter else 0),
            replicas=replica_infos(self.replicas, attachment),
            restarts=Restarts(
                ganesha=exporter.restarts if exporter else self.ganesha_restarts,
                engine=self.repairs + self.resumes + (len(attachment.resumed) if attachment else 0),
                replicas=sum(server.restarts for server in self.replicas or ()),
            ),
            nfs=nfs.io,
            started_at=self.started_at,
            data_dir_free_bytes=known_free_bytes(self.paths.data_dir),
            metrics=metrics_url(self.host, self.options.metrics_port),
            last_failure=self.last_failure,
            node=self.home.node,
            phases=dict(self.phases),
        )


def _repairable(caught: BaseException) -> Exception | None:
    """The error, out of its groups, that a new attachment may mend; None when we are leaving, or it is final."""
    if trio.current_effective_deadline() == -math.inf:
        return None
    errors = [error for error in leaves(caught) if not isinstance(error, trio.Cancelled)]
    for error in errors:
        if not isinstance(error, REPAIRABLE) or isinstance(error, (FencedOffError, FencedError, GaveUpError)):
            return None
    return errors[0] if errors and isinstance(errors[0], Exception) else None
