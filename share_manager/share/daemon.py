"""The per-volume process: everything from replica servers to the NFS export, in the order of the data path.

Leaving is a cancellation: each block undoes itself, shielded, in reverse order. A failure that needs more than a new
ganesha ends the attachment and everything on it, and the loop in `Share.run` makes the next one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Awaitable, Callable

import msgspec
import trio

from engine.errors import EngineError, FencedError, NoReplicaError
from engine.record import VolumeRecord
from ganesha import GaneshaError
from share_manager import units
from share_manager.errors import (
    FencedOffError,
    GaveUpError,
    NoReplicaAvailableError,
    RuntimeProblem,
    ShareManagerError,
    leaves,
)
from share_manager.events import Reporter
from share_manager.paths import VolumePaths
from share_manager.share.attachment import Attachment, attach
from share_manager.share.background import background
from share_manager.share.commands import find_program
from share_manager.share.control import control_socket
from share_manager.share.disk import disk_full, free_bytes, is_full, watch_disk
from share_manager.share.export import Exporter, ExportOptions, server_config
from share_manager.share.filesystem import FilesystemOptions, Mounted, mounted
from share_manager.share.private import PrivateRoom, image_size, private_room
from share_manager.share.replicas import ReplicaServer, run_replicas
from share_manager.share.session import (
    DEFAULT_REPLICAS,
    DEFAULT_SIZE,
    VolumeOptions,
    check_port,
    clear_leftovers,
    leave_on_signals,
    open_or_create,
    reachable_host,
    require_root,
    runtime,
    undo_creation,
)
from share_manager.share.snapshot import metrics_url, nfs_status, replica_infos, used_bytes
from share_manager.share.state import StateFile
from share_manager.share.status import (
    GaneshaInfo,
    ProcessInfo,
    Restarts,
    ShareStatus,
    engine_info,
)
from share_manager.share.supervise import Backoff, Policy
from share_manager.volumes import volume_lock

REPAIRABLE = (ShareManagerError, EngineError, GaneshaError, OSError)
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


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    volume: VolumeOptions = VolumeOptions()
    filesystem: FilesystemOptions = FilesystemOptions()
    export: ExportOptions = ExportOptions()
    metrics_port: int = 0
    policy: Policy = Policy()


class Share:
    """One served volume. `run` is its life; everything else looks at it from outside."""

    def __init__(self, paths: VolumePaths, options: ServeOptions, report: Reporter) -> None:
        self.paths = paths
        self.options = options
        self.report = report
        self.state = "starting"
        self.started_at = time.time()
        self.repairs = 0
        self.resumes = 0
        self.last_failure = ""
        self.record: VolumeRecord | None = None
        self.attachment: Attachment | None = None
        self.mounted: Mounted | None = None
        self.exporter: Exporter | None = None
        self.replicas: tuple[ReplicaServer, ...] = ()
        self.ganesha_restarts = 0
        self._was_ready = False
        export = options.export
        self.host = reachable_host(export.bind)
        self.endpoint = units.endpoint(self.host, export.port, paths.volume)
        self.mount_command = units.mount_command(self.host, export.port, paths.volume)

    async def run(self, beside: Callable[[Share], Awaitable[None]] | None = None) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP. `beside` runs along, such as a live view.

        Raises ShareManagerError, EngineError, GaneshaError, OSError; nothing half-made is left then.
        """
        require_root("serve")
        programs = list(SERVE_PROGRAMS)
        if self.options.filesystem.kind == "xfs":
            programs += ["mkfs.xfs", "xfs_growfs"]
        for program in programs:
            find_program(program)
        with volume_lock(self.paths, "first"):
            async with leave_on_signals(self.report, self._leaving):
                await clear_leftovers(self.paths, self.report)
                check_port(self.options.export.bind, self.options.export.port)
                if self.options.metrics_port:
                    check_port(self.options.export.bind, self.options.metrics_port, "--metrics-port")
                if not self.paths.directory.exists():
                    self._check_space()
                self.record, made = open_or_create(self.paths, self.options.volume, self.report)
                try:
                    await self._run(beside)
                except BaseException as caught:
                    if made and not self._was_ready:
                        full = is_full(self.paths.data_dir)
                        undo_creation(self.paths)
                        if full and not isinstance(caught, trio.Cancelled):
                            raise disk_full(self.paths.data_dir) from caught
                    raise
            self.report.emit("stopped", "stopped", volume=self.paths.volume)

    def _check_space(self) -> None:
        """Raises DiskError when a new volume does not even have room for its empty filesystem."""
        volume = self.options.volume
        need = image_size(volume.size or DEFAULT_SIZE) + _EMPTY_FILESYSTEM
        if free_bytes(self.paths.data_dir) < need * (volume.replicas or DEFAULT_REPLICAS):
            raise disk_full(self.paths.data_dir)

    async def _run(self, beside: Callable[[Share], Awaitable[None]] | None) -> None:
        assert self.record is not None
        async with (
            runtime(self.paths, "serve") as state,
            control_socket(self.paths.control, self.status) as answer,
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
            async with run_replicas(self.record.replicas, self.paths, self.report, state) as self.replicas:
                await self._attachments(state)

    def _leaving(self) -> None:
        self.state = "stopping"

    async def _attachments(self, state: StateFile) -> None:
        """One attachment after the other, until cancelled."""
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
                reason, patient = str(error), isinstance(error, (NoReplicaAvailableError, NoReplicaError))
            if is_full(self.paths.data_dir):
                reason, patient = f"{reason}; {disk_full(self.paths.data_dir)}", True
            self.state = "repairing"
            self.last_failure = reason
            pause = backoff.failed(trio.current_time())
            # replicas that are away come back when their machine does, and somebody frees the disk: that is waited for
            if backoff.quick_failures >= policy.give_up_after and not patient:
                raise GaveUpError(backoff.quick_failures, reason)
            again = f" in {pause:.1f} s" if pause else ""
            self.report.warn("repairing", f"{reason}; attaching again{again}", reason=reason)
            await trio.sleep(pause)
            self.repairs += 1

    async def _attachment(self, state: StateFile) -> str:
        """One attachment, from claiming its epoch to its end; why it ended."""
        assert self.record is not None
        fs_options = self.options.filesystem
        if self._was_ready:
            # what was asked for once is not forced on what a client has changed since
            fs_options = msgspec.structs.replace(fs_options, root_owner=None, root_mode=None)
        try:
            async with attach(
                self.paths, self.report, state, self.options.policy, frontend=self.options.volume.frontend
            ) as attachment:
                self.attachment = attachment
                self.record = attachment.record
                self.report.emit(
                    "attached",
                    f"attached as {attachment.device} (epoch {attachment.epoch})",
                    device=attachment.device,
                    block_file=str(self.paths.block_file),
                    epoch=attachment.epoch,
                )
                async with (
                    mounted(
                        attachment.device,
                        volume=self.paths.volume,
                        volume_uuid=self.record.uuid,
                        marker=self.paths.formatting,
                        target=self.paths.mountpoint,
                        options=fs_options,
                        report=self.report,
                        give_up=attachment.break_off,
                    ) as self.mounted,
                    private_room(
                        self.paths.mountpoint,
                        self.record.size,
                        self.report,
                        lambda device: state.update(private_device=device),
                        attachment.break_off,
                    ) as room,
                ):
                    await self._export(attachment, self.mounted, room, state)
            if attachment.fenced is not None:
                raise attachment.fenced
            return attachment.broken or "the attachment ended"
        finally:
            if self.attachment is not None:
                self.resumes += len(self.attachment.resumed)
            self.attachment = self.mounted = None

    async def _export(self, attachment: Attachment, on: Mounted, room: PrivateRoom, state: StateFile) -> None:
        assert self.record is not None
        config = server_config(self.options.export, self.paths.volume, self.record.uuid, on.data, room.recovery_root)
        exporter = Exporter(config, self.paths, self.report, state, self.options.policy)
        exporter.restarts = self.ganesha_restarts
        self.exporter = exporter
        self.report.emit("exporting", f"exporting /{self.paths.volume}", path=str(on.data))

        async def ready() -> None:
            self._ready(attachment, exporter, state)

        def lost() -> None:
            self.ganesha_restarts = exporter.restarts
            if self.state == "running":
                self.state = "repairing"

        try:
            await exporter.run(attachment, on, room, ready, lost)
        finally:
            self.exporter = None

    def _ready(self, attachment: Attachment, exporter: Exporter, state: StateFile) -> None:
        if self.state != "stopping":
            self.state = "running"
        state.update(endpoint=self.endpoint)
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

    async def status(self) -> ShareStatus:
        record, attachment, mounted_fs, exporter = self.record, self.attachment, self.mounted, self.exporter
        server = exporter.server if exporter else None
        engine = attachment.engine if attachment is not None and attachment.engine.returncode is None else None
        nfs = await nfs_status(server)
        return ShareStatus(
            volume=self.paths.volume,
            state=self.state,
            kind="serve",
            endpoint=self.endpoint,
            mount_command=self.mount_command,
            uuid=record.uuid if record else "",
            epoch=attachment.epoch if attachment else (record.epoch if record else 0),
            size_bytes=record.size if record else 0,
            filesystem=mounted_fs.kind if mounted_fs else None,
            used_bytes=used_bytes(mounted_fs.root) if mounted_fs else None,
            in_grace=nfs.in_grace,
            grace_ends_at=nfs.grace_ends_at,
            clients=nfs.clients,
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
                replicas=sum(server.restarts for server in self.replicas),
            ),
            nfs=nfs.io,
            started_at=self.started_at,
            data_dir_free_bytes=free_bytes(self.paths.data_dir),
            metrics=metrics_url(self.host, self.options.metrics_port),
            last_failure=self.last_failure,
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
