"""One ganesha with its private message bus, as children of this process."""

import os
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import trio

from ganesha import logs, wake
from ganesha.children import Process, end, find_program, run_bus, spawn, spawn_tied
from ganesha.config import Export, ServerConfig
from ganesha.dbus import BUS_CONFIG, Control, NfsClient, ServerStats, bus_address, plain_address
from ganesha.errors import ConfigError, DbusError, HealthError, NotReadyError, StartError, UpdateError
from ganesha.health import null_call
from ganesha.logs import EventKind, LogEvent, LogTail
from ganesha.reach import HERE, Reach
from ganesha.recovery import ClientRecord, consolidate, list_records, make_durable
from ganesha.render import render
from ganesha.wake import waking

STOP_TIMEOUT = 10.0
_EVENTS = 1000
_POLL = 0.1
_READY_POLL = 0.02  # clients wait for it
_GRACE_POLL = 0.25  # others wait for its end
_SOCKET_PATH_MAX = 107  # unix(7): sun_path holds 108 bytes with its NUL
_NULL_TIMEOUT = 2.0
_RECORDS_TIMEOUT = 2.0


class GraceState(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a grace period is on, and then its latest end, in seconds since 1970.

    `reclaimed` of `expected` recorded clients had finished when ganesha last looked; NFSv4.0 clients never say that
    they have.
    """

    active: bool
    ends_at: float | None = None
    reclaimed: int = 0
    expected: int = 0


class Ganesha:
    """A running server; made by run_ganesha.

    `events` drops the oldest when nobody reads; it ends when the server's scope does.
    """

    def __init__(
        self,
        config: ServerConfig,
        run_dir: Path,
        process: Process,
        dbus: trio.Process,
        control: Control,
        reach: Reach,
    ) -> None:
        self._config = config
        self._reach = reach
        self._run_dir = run_dir
        self._process = process
        self._dbus = dbus
        self._control = control
        self._tail = LogTail(log_path(run_dir))
        self._send, self.events = trio.open_memory_channel[LogEvent](_EVENTS)
        self._drop = self.events.clone()
        self._start_log: list[LogEvent] = []
        self._initialized = False
        self._grace_until: float | None = None
        self._in_grace = False
        self._stopping = False
        self._reclaimed = (0, 0)
        self._filesystems: dict[str, uuid.UUID] = {}
        self._roots: dict[str, str] = {}
        self._update = trio.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def dbus_pid(self) -> int:
        return self._dbus.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def config(self) -> ServerConfig:
        """What is in force, with the changes of update_exports."""
        return self._config

    async def wait_ready(self, timeout: float) -> None:
        """Returns once the server answers an NFSv4 NULL call and has all its exports.

        Raises StartError, with the reason from its log, as soon as it has exited or has left out an export, and
        NotReadyError after `timeout` seconds.
        """
        with trio.move_on_after(timeout):
            pause = 0.01
            while True:
                if await self._ready():
                    return
                if self.returncode is not None:
                    raise self._failed_start()
                await trio.sleep(pause)
                pause = min(pause * 1.5, _READY_POLL)
        self._read_log()
        reason = logs.failure_reason(self._start_log)
        raise NotReadyError(
            f"not ready after {timeout:g} s" + (f": {reason}" if reason else ""), log=log_path(self._run_dir)
        )

    async def _ready(self) -> bool:
        # The log comes first: until this server says that it listens, a NULL call may be answered by another one.
        self._read_log()
        if not self._initialized:
            return False
        try:
            if not await self._control.name_owned():
                return False
            await null_call(self._config.connect_host, self._config.port, _NULL_TIMEOUT, self._reach)
            present = await self._control.export_ids()
        except (DbusError, HealthError):
            return False
        if self.returncode is not None:
            return False
        # ganesha serves without an export that it cannot make, with no more than a line in its log.
        if missing := {export.export_id for export in self._config.exports} - present:
            paths = ", ".join(str(export.path) for export in self._config.exports if export.export_id in missing)
            reason = logs.failure_reason(self._start_log) or "no reason given"
            raise StartError(f"it does not export {paths}: {reason}", log=log_path(self._run_dir))
        return True

    def _failed_start(self) -> StartError:
        self._read_log()
        reason = logs.failure_reason(self._start_log) or f"it exited with status {self.returncode}"
        return StartError(reason, log=log_path(self._run_dir), returncode=self.returncode)

    async def wait(self) -> int:
        """Waits for the exit; returns the status, negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self._process.kill()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        self._stopping = True
        self._process.terminate()

    async def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """SIGTERM, and SIGKILL after `timeout` seconds. Client records stay, so clients reclaim at the next start.

        Raises StopError when not even SIGKILL ends it in time, because it hangs on I/O.
        """
        self._stopping = True
        await end(self._process, timeout)

    async def null_call(self, timeout: float = _NULL_TIMEOUT) -> None:
        """Raises HealthError when the server does not answer within `timeout` seconds."""
        await null_call(self._config.connect_host, self._config.port, timeout, self._reach)

    async def clients(self) -> list[NfsClient]:
        """Addresses that made more than NULL calls since the start, with the ids of clients that hold a lease there.

        A client whose lease expired or was given back, as by a clean unmount, stays listed without its id. Behind a
        translation to one source address (DESIGN section 5) there is one entry. Raises DbusError, RecoveryError.
        """
        clients = await self._control.clients()
        # The records lie on the volume, which may hang; the counters above must be there all the same.
        records: list[ClientRecord] = []
        with trio.move_on_after(_RECORDS_TIMEOUT):
            records = await trio.to_thread.run_sync(list_records, self._config.recovery_root, abandon_on_cancel=True)
        ids: dict[str, list[str]] = {}
        for record in records:
            if not record.old:
                ids.setdefault(plain_address(record.address), []).append(record.client_id)
        return [
            msgspec.structs.replace(client, client_ids=tuple(sorted(ids.get(client.address, ()))))
            for client in clients
            if client.versions
        ]

    async def grace(self) -> GraceState:
        """Raises DbusError."""
        active = await self._control.in_grace()
        if not active:
            return GraceState(active=False)
        reclaimed, expected = self._reclaimed
        return GraceState(active=True, ends_at=self._grace_until, reclaimed=reclaimed, expected=expected)

    def carries_uuid(self, export_id: int, fs_uuid: uuid.UUID) -> bool:
        """Whether the handles of an export name its filesystem by this UUID, and so stay valid on another node.

        ganesha falls back to device numbers, which change with the node (ESTALE), when blkid cannot tell the UUID.
        Known from its log once it is ready; unlike export_handle it needs no access to the export.
        """
        path = next((str(export.path) for export in self._config.exports if export.export_id == export_id), None)
        return path is not None and self._filesystems.get(self._roots.get(path, "")) == fs_uuid

    async def stats(self) -> ServerStats:
        """Raises DbusError."""
        return await self._control.stats()

    async def update_exports(self, exports: Sequence[Export]) -> None:
        """Makes these the exports in force, without disturbing clients of those that stay.

        The path of an export id cannot change. Raises ConfigError before anything happened; UpdateError, DbusError
        when ganesha refused, with the earlier changes of the call in force and the configuration file as asked for.
        """
        async with self._update:
            known = {export.export_id: export for export in self._config.exports}
            for export in exports:
                old = known.get(export.export_id)
                if old is not None and old.path != export.path:
                    raise ConfigError(f"export {export.export_id} is {old.path}; another path needs another export id")
            config = msgspec.structs.replace(self._config, exports=tuple(exports))
            try:
                path = write_config(config, self._run_dir)
            except OSError as error:
                raise UpdateError(f"cannot write the configuration: {error.strerror}") from error
            self._config = config
            present = await self._control.export_ids()
            wanted = {export.export_id for export in exports}
            for export_id in sorted(present - wanted):
                await self._control.remove_export(export_id)
            for export in exports:
                if export.export_id not in present:
                    await self._control.add_export(path, export.export_id)
                elif known.get(export.export_id) != export:
                    await self._control.update_export(path, export.export_id)
            if await self._control.export_ids() != wanted:
                raise UpdateError(f"ganesha does not have the exports {sorted(wanted)} after the change")

    async def _follow_log(self) -> None:
        while True:
            self._read_log()
            await trio.sleep(_POLL)

    async def _end_grace_early(self) -> None:
        with waking(self._run_dir) as waker:
            while not self._stopping:
                # before that it has not read who may reclaim
                if self._initialized and self._in_grace:
                    waker.wake()
                await trio.sleep(_GRACE_POLL)

    def _read_log(self) -> None:
        try:
            events = self._tail.read()
        except OSError:  # a full or failing disk must not end the server
            return
        for event in events:
            if not self._initialized:
                self._start_log.append(event)
            if event.kind is EventKind.INITIALIZED:
                self._initialized = True
            elif event.kind is EventKind.GRACE_STARTED and event.grace_seconds is not None:
                self._grace_until = event.time + event.grace_seconds
                self._in_grace = True
            elif event.kind is EventKind.GRACE_ENDED:
                self._in_grace = False
            elif (reclaimed := event.reclaimed) is not None:
                if reclaimed == self._reclaimed:
                    continue
                self._reclaimed = reclaimed
            elif (filesystem := event.filesystem) is not None:
                mount, self._filesystems[mount] = filesystem
            elif event.message.startswith("Root fs for export "):
                for export in self._config.exports:
                    prefix = f"Root fs for export {export.path} is "
                    if event.message.startswith(prefix):
                        self._roots[str(export.path)] = event.message.removeprefix(prefix)
            self._publish(event)

    def _publish(self, event: LogEvent) -> None:
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._drop.receive_nowait()
            self._send.send_nowait(event)

    def _close(self) -> None:
        try:
            self._read_log()
        finally:
            self._tail.close()
            self._drop.close()
            self._send.close()


@asynccontextmanager
async def run_ganesha(
    config: ServerConfig,
    *,
    run_dir: Path,
    epoch: int,
    keep_fds: Sequence[int] = (),
    stop_timeout: float = STOP_TIMEOUT,
    reach: Reach = HERE,
    tied: bool = False,
    before_start: Callable[[], Awaitable[None]] | None = None,
) -> AsyncIterator[Ganesha]:
    """Starts a server, which may not be ready yet, and stops it at the end: SIGTERM, then SIGKILL after `stop_timeout`.

    `run_dir`, absolute and on this machine, gets its configuration, log and bus socket, and is made private to the
    user. `epoch` (32 bits) must never be used twice for a volume: write verifiers, client ids and stateids derive from
    it. `keep_fds` are inherited under the same numbers. It runs in the namespace of `reach`. When this process dies
    the server lives on, unless it is `tied`: then the kernel kills it. `before_start` is awaited when all else is
    ready.

    Raises ConfigError, MissingProgramError, StartError, RecoveryError, and at the end StopError.
    """
    if not 0 < epoch < 2**32:
        raise ConfigError(f"the epoch must be 1 to {2**32 - 1}, not {epoch}")
    ganesha_program = find_program("ganesha.nfsd", "nfs-ganesha")
    find_program("dbus-daemon", "dbus-daemon")
    path = _prepare(config, run_dir)
    # In a thread that may be left behind, since the volume may hang.
    await trio.to_thread.run_sync(_prepare_records, config.recovery_root, abandon_on_cancel=True)
    command = [*reach.argv(), ganesha_program, "-F", "-E", str(epoch), "-f", str(path), "-L", str(log_path(run_dir))]
    command += ["-p", str(run_dir / "ganesha.pid")]
    bus_socket = run_dir / "bus.sock"
    # With the host's blkid cache ganesha would take the UUID that the device, such as /dev/loop0, had under its last
    # owner (measured), and handles would not survive a failover.
    environment = {
        "DBUS_SYSTEM_BUS_ADDRESS": bus_address(bus_socket),
        "BLKID_FILE": str(run_dir / "blkid.tab"),
        **wake.environment(run_dir, os.environ),
    }
    async with run_bus(run_dir) as bus:
        if before_start is not None:
            await before_start()
        fds = (*keep_fds, *reach.fds())
        if tied:
            process: Process = spawn_tied(command, log_path(run_dir), environment, fds)
        else:
            process = await spawn(command, log_path(run_dir), environment, fds)
        ganesha = Ganesha(config, run_dir, process, bus, Control(bus_socket), reach)
        try:
            with _unwrapped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ganesha._follow_log)
                    nursery.start_soon(ganesha._end_grace_early)
                    try:
                        yield ganesha
                    finally:
                        with trio.CancelScope(shield=True):
                            await ganesha.stop(stop_timeout)
                        nursery.cancel_scope.cancel()
        finally:
            ganesha._close()


def log_path(run_dir: Path) -> Path:
    """The server's log file; one previous is kept beside it as `.1`."""
    return run_dir / "ganesha.log"


def write_config(config: ServerConfig, run_dir: Path) -> Path:
    """Replaces ganesha.conf in one step. Raises ConfigError, OSError."""
    path = run_dir / "ganesha.conf"
    temporary = run_dir / "ganesha.conf.new"
    temporary.write_text(render(config, run_dir), encoding="utf-8", errors="surrogateescape")
    os.replace(temporary, path)
    return path


def _prepare_records(recovery_root: Path) -> None:
    # ganesha would create at most the last directory, and go on without records when it cannot.
    make_durable(recovery_root)
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
        mapped = True
    except OSError:
        mapped = False
    consolidate(recovery_root, mapped=mapped)


def _prepare(config: ServerConfig, run_dir: Path) -> Path:
    if len(bytes(run_dir / "bus.sock")) > _SOCKET_PATH_MAX:
        raise ConfigError(f"the run directory's path is too long for a socket: {run_dir}")
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_dir.chmod(0o700)
        logs.rotate(log_path(run_dir))
        for name in ("bus.sock", "bus.log", "blkid.tab", "ganesha.pid"):
            (run_dir / name).unlink(missing_ok=True)
        bus = BUS_CONFIG.format(uid=os.getuid(), address=bus_address(run_dir / "bus.sock"))
        (run_dir / "bus.conf").write_text(bus)
        wake.make(run_dir)
        return write_config(config, run_dir)
    except OSError as error:
        raise StartError(f"cannot prepare {run_dir}: {error.strerror}") from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """A nursery wraps the one exception of its body in a group, which callers of this module need not know."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
