"""A share of several nodes: `share-manager share`.

The record is on a record server, the replicas are on their nodes, and a lease says which of the processes for the
volume serves it (share/handover.py decides). While this process does not serve it stands by, with an engine that has
loaded everything, for the moment that it does.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from engine.errors import EngineError, RecordError
from engine.record import ReplicaRecord, VolumeRecord
from engine.records import Lease, Presence, RecordsClient
from engine.secret import read_secret, volume_secret, write_secret
from ganesha import Reach, prune_records
from share_manager.cluster import ENCRYPTED, PRESENT, UNFORMATTED
from share_manager.errors import (
    DiskError,
    FencedOffError,
    NetworkError,
    ReplicaProcessError,
    ServedElsewhereError,
    is_ours,
    leaves,
)
from share_manager.events import Reporter
from share_manager.node.address import FloatingAddress, FloatingAddressError
from share_manager.node.connections import Connection, established, tickle
from share_manager.node.sockets import end_served
from share_manager.paths import VolumePaths
from share_manager.share.background import Background, background
from share_manager.share.drain import Door, door, drain
from share_manager.share.gone import GONE, is_one_of, names_for
from share_manager.share.handover import HOLDING, Handover, Role, Timing
from share_manager.share.home import Hosting, Hostings, Tenant
from share_manager.share.lifeline import Lifeline, lifeline
from share_manager.share.luks import Header, read_header, write_header
from share_manager.share.network import HostNetwork, ShareNetwork
from share_manager.share.onvolume import on_volume
from share_manager.share.peer import Alive, answer_peers, ask_header, ask_peer
from share_manager.share.records import Records, ServedRecords, once_there
from share_manager.share.session import VolumeOptions
from share_manager.share.state import StateFile
from share_manager.share.status import FailoverInfo, NodeInfo
from share_manager.share.warm import WarmEngine, warm_up

ANNOUNCE_EVERY = 1.0
# clients connect then, and nobody else knows of them yet
ANNOUNCE_SOON, SOON = 0.2, 10.0
RELEASE_PATIENCE = 3.0
ADDRESS_LIFETIME = 3
ADDRESS_EVERY = 0.5
# a client that was cut off with the node before must find this one before the grace period ends
ARP_AGAIN = (0.1, 0.5, 1.0, *range(3, 33, 2))
ARP_SOON = 2.0
PEER_AGAIN = 0.5
LEARN_AGAIN = 2.0
WARM_PATIENCE = 3.0
TICKLE_AFTER = (0.0, 0.2, 0.6, 2.0, *(2.0 for _ in range(14)))


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """`standby`: stay when another node serves. `address`: under which clients know the share."""

    node: str
    standby: bool = False
    address: FloatingAddress | None = None
    timing: Timing = Timing()
    frontend: str = "device"
    port: int = 2049
    right_lasts: float = 0.0


class RemoteReplica:
    """One that another process hosts, on this node or another."""

    known = False
    pid = None
    listening = True
    failure = ""
    restarts = 0

    def __init__(self, record: ReplicaRecord) -> None:
        self.record = record

    @property
    def name(self) -> str:
        return self.record.name


class RemoteReplicas:
    def __init__(self, records: tuple[ReplicaRecord, ...]) -> None:
        self._replicas = [RemoteReplica(record) for record in records]

    def __iter__(self) -> Iterator[Hosting]:
        return iter(self._replicas)

    async def start(self, name: str, directory: Path) -> None:
        raise ReplicaProcessError(name, "the replicas of this volume are hosted by their nodes")

    async def stop(self, name: str) -> None:
        raise ReplicaProcessError(name, "the replicas of this volume are hosted by their nodes")


class NodeHome:
    kind = "share"

    def __init__(
        self, paths: VolumePaths, client: RecordsClient, secret_file: Path, options: NodeOptions, report: Reporter
    ) -> None:
        self._paths = paths
        self._client = client
        self._leases = client.another()
        self._watching = client.another()
        self._present = client.another()
        self._secret_file = secret_file
        self._options = options
        self._report = report
        self._served_records = ServedRecords(client, paths.volume, secret_file, self._ours)
        self.records: Records = self._served_records
        self.lifeline: Lifeline | None = None
        self._record: VolumeRecord | None = None
        self._warm: WarmEngine | None = None
        self._answers = True
        self._serving = trio.CancelScope()
        self._turned = trio.Condition()
        self._changed = trio.Event()
        self._watch = trio.CancelScope()
        self._warming = trio.CancelScope()
        self._key = b""
        self._peer = ""
        self._peers: dict[str, str] = {}
        self._exported, self._exported_at = False, -math.inf
        self._clients: tuple[str, ...] = ()
        self._unformatted = False
        self._door = Door(paths.volume, options.port, None)
        self._network: ShareNetwork = HostNetwork(_by_the_server)
        self._tasks: Background
        self.handover = Handover(
            options.node,
            os.urandom(8).hex(),
            stay=options.standby,
            timing=options.timing,
            new_id=lambda: os.urandom(6).hex(),
        )

    def _ours(self, lease: Lease) -> bool:
        return (lease.holder, lease.instance) == (self._options.node, self.handover.instance)

    @property
    def node(self) -> NodeInfo:
        handover, failover = self.handover, self.handover.failover
        return NodeInfo(
            name=self._options.node,
            role=handover.role.value,
            holder=handover.lease.holder,
            phase=handover.lease.phase,
            address=str(self._options.address or ""),
            last_failover=None if failover is None else msgspec.convert(failover, FailoverInfo, from_attributes=True),
            records=self._answers,
        )

    async def open(self, options: VolumeOptions, report: Reporter) -> tuple[VolumeRecord, bool]:
        """The record exists: whoever made the volume made it. Waits for a record server that is away."""

        async def read() -> VolumeRecord:
            record = await trio.to_thread.run_sync(self._client.read_record, self._paths.volume)
            self._paths.log.mkdir(parents=True, exist_ok=True, mode=0o700)
            await self._read_marks()
            return record

        try:
            record = await once_there(read, report)
            self._key = volume_secret(read_secret(self._secret_file), record.uuid)
            write_secret(self._paths.secret, self._key)
        except OSError as error:
            raise DiskError(self._paths.directory, error) from error
        self._record = record
        return record, False

    @contextlib.asynccontextmanager
    async def replicas(self, record: VolumeRecord, report: Reporter, state: StateFile) -> AsyncIterator[Hostings]:
        yield RemoteReplicas(record.replicas)

    def take_warm(self) -> WarmEngine | None:
        warm, self._warm = self._warm, None
        if warm is None or not warm.usable:
            return None
        failover = self.handover.failover
        if self._record is not None and failover is not None and failover.silent:
            warm.doubted = tuple(one.name for one in self._record.replicas if one.node == failover.before)
        return warm

    # serving

    async def tenure(self, share: Tenant, state: StateFile, serve: Callable[[], Awaitable[None]]) -> None:
        """Stand by and serve, in turn, until the process is to end. Raises ShareManagerError, EngineError."""
        assert share.network is not None
        self._network = share.network
        with contextlib.ExitStack() as stack:
            self._door = stack.enter_context(door(self._paths.volume, self._options.port, self._network.namespace))
            # closed after a move, and as long as this one stands by; but it must not outlive its volume's process
            stack.callback(self._door.open)
            self.lifeline = self._served_records.lifeline = stack.enter_context(lifeline(self.handover.instance))
            await self._tenures(share, state, serve)

    async def _tenures(self, share: Tenant, state: StateFile, serve: Callable[[], Awaitable[None]]) -> None:
        async with background() as self._tasks:
            self._tasks.start_soon(self._follow_lease, share)
            self._tasks.start_soon(self._announce, share)
            self._tasks.start_soon(self._answer_peers, share)
            self._tasks.start_soon(self._ask_holder)
            self._tasks.start_soon(self._learn_key, share)
            if self._options.address is not None:
                self._tasks.start_soon(self._hold_address, self._options.address)
            try:
                while await self._wait_for_turn(share, state):
                    await self._serve(share, serve)
            finally:
                self.silence()
                with trio.CancelScope(shield=True):
                    await self._let_go()

    async def _wait_for_turn(self, share: Tenant, state: StateFile) -> bool:
        """Stand by until it is ours to serve; False when we are to end. Raises ServedElsewhereError."""
        handover = self.handover
        warm = None
        try:
            while handover.role is not Role.TAKING:
                if handover.role is Role.ENDED:
                    if handover.elsewhere and handover.failover is None:
                        raise ServedElsewhereError(self._paths.volume, handover.lease.holder)
                    return False
                if handover.role is Role.STANDBY and share.state not in ("standby", "stopping") and handover.version:
                    share.state = "standby"
                    self._changed.set()
                    there = handover.lease.holder if handover.lease.phase == "serving" else "nobody"
                    self._tell("standby", f"standing by: {there} serves")
                if handover.role is Role.STANDBY and warm is None:
                    with trio.CancelScope() as self._warming:
                        warm = await self._warm_up(state)
                await self._news()
            self._warm, warm = warm, None
            return True
        finally:
            if warm is not None:
                with trio.CancelScope(shield=True):
                    await warm.abandon()

    async def _warm_up(self, state: StateFile) -> WarmEngine | None:
        assert self._record is not None
        frontend, lasts = self._options.frontend, self._options.right_lasts
        return await warm_up(self._paths, self.records, self._record, self._report, state, frontend, lasts, self._tasks)

    async def _serve(self, share: Tenant, serve: Callable[[], Awaitable[None]]) -> None:
        """One tenure. Raises what is to end the process."""
        handover, warm = self.handover, self._warm
        assert handover.failover is not None
        first = handover.failover
        self._tell("taking_over", f"taking over from {first.before or 'nobody'}: {first.cause}", cause=first.cause)
        share.begin()
        failure: Exception | None = None
        try:
            with trio.CancelScope() as self._serving:
                if handover.role is not Role.TAKING:
                    self._serving.cancel()
                await serve()
        except Exception as caught:
            failure = _ours(caught)
            if failure is None:
                raise
        finally:
            self.silence()
            if warm is not None:
                with trio.CancelScope(shield=True):
                    await warm.abandon()
        fenced = isinstance(failure, FencedOffError)
        served = handover.role is Role.SERVING
        handover.ended(trio.current_time(), failed=failure is not None, fenced=fenced)
        self._watch.cancel()
        if handover.deposed:
            raise failure or FencedOffError(self._paths.volume, f"{handover.lease.holder} has the lease")
        if failure is not None:
            if served or not self._options.standby:
                raise failure
            self._report.warn("takeover_failed", str(failure), failover=first.id, reason=str(failure))
        while handover.role in HOLDING:
            await self._news()
        self._tell("left", f"left the volume to {handover.lease.wanted or 'whoever stands by'}")

    async def _let_go(self) -> None:
        """Release the lease, if it is ours and the record server answers soon."""
        handover = self.handover
        handover.stopped()
        self._watch.cancel()
        with trio.move_on_after(RELEASE_PATIENCE):
            while handover.role in HOLDING:
                await self._news()

    async def before_mount(self) -> None:
        await self._read_marks()

    async def _read_marks(self) -> None:
        """Whether a filesystem may be half made, or is encrypted, is known to all nodes; what this one thinks of it may
        be long past. Raises RecordError."""
        volume, paths = self._paths.volume, self._paths
        marks = [
            await trio.to_thread.run_sync(self._client.read_mark, volume, name) for name in (UNFORMATTED, ENCRYPTED)
        ]
        unformatted, header = marks
        self._unformatted = unformatted is not None
        if self._unformatted:
            paths.formatting.write_text("")
        else:
            paths.formatting.unlink(missing_ok=True)
        if header is not None:
            write_header(paths, Header(uuid=header, finished=True))
        elif not self._unformatted:
            paths.encryption.unlink(missing_ok=True)

    async def may_export(self) -> None:
        self._door.open()
        if self._options.address is not None:
            # a client connects from the same port as ever: what is left of its connection would answer
            reach = Reach(self._network.namespace)
            await end_served(self._options.address.address, self._options.port, reach)
        if self._unformatted:
            # before any client can write
            header = read_header(self._paths)
            if header is not None:
                await trio.to_thread.run_sync(self._client.set_mark, self._paths.volume, ENCRYPTED, header.uuid)
            await trio.to_thread.run_sync(self._client.set_mark, self._paths.volume, UNFORMATTED, None)

    async def before_export(self, recovery_root: Path) -> None:
        """The grace period is not to wait for clients that cannot come."""
        text = await trio.to_thread.run_sync(self._client.read_mark, self._paths.volume, GONE)
        if names := names_for(text, self.handover.lease.epoch):
            removed = await on_volume(prune_records, recovery_root, lambda record: is_one_of(record, names))
            forgotten = [record.client_id for record in removed]
            self._tell("clients_forgotten", f"{len(forgotten)} clients are gone and not waited for", clients=forgotten)

    def exported(self, epoch: int) -> None:
        handover = self.handover
        taken = handover.role is Role.TAKING
        handover.ready(epoch, trio.current_time(), time.time())
        self._exported, self._exported_at = True, trio.current_time()
        if self._options.address is not None:
            with contextlib.suppress(FloatingAddressError, OSError):
                self._hold(self._options.address)
            self._announce_address(self._options.address)
            before = handover.failover.before if taken and handover.failover is not None else self._options.node
            self._tasks.start_soon(self._tickle, before)
        self._watch.cancel()
        if taken and handover.failover is not None:
            done = handover.failover
            message = f"{done.after} serves {done.duration:.2f} s after the last sign of {done.before or 'nobody'}"
            self._tell("took_over", message, cause=done.cause, before=done.before, duration=done.duration, epoch=epoch)

    async def drain(self, pid: int) -> None:
        if await drain(self._door, self._options.port, pid):
            return
        self._report.emit("not_drained", "requests were under way when the server was stopped", pid=pid)

    def silence(self) -> None:
        if self._exported:
            self._clients = self._connections()
        self._exported = False
        if self._options.address is not None:
            with contextlib.suppress(OSError):
                self._network.inside(self._options.address.drop)

    def _hold(self, address: FloatingAddress) -> None:
        """Raises FloatingAddressError, OSError."""
        self._network.inside(lambda: address.hold(ADDRESS_LIFETIME))

    def _announce_address(self, address: FloatingAddress) -> None:
        with contextlib.suppress(OSError):
            self._network.inside(address.announce)

    # beside

    async def _follow_lease(self, share: Tenant) -> None:
        handover, volume = self.handover, self._paths.volume
        while True:
            now = trio.current_time()
            if share.state == "running":
                handover.well()
            elif handover.role is Role.SERVING:
                handover.unwell(now)
            before = handover.role
            step = handover.step(now)
            if handover.role is not before:
                await self._turn(before)
            done = False
            try:
                if step.swap is not None:
                    done, lease, version = await trio.to_thread.run_sync(
                        self._leases.swap_lease, volume, handover.version, step.swap, abandon_on_cancel=True
                    )
                else:
                    # by a connection of its own, or a change of ours would have to wait for the end of this
                    with trio.CancelScope() as self._watch:
                        lease, version = await trio.to_thread.run_sync(
                            self._watching.read_lease, volume, handover.version, step.watch, abandon_on_cancel=True
                        )
                    if self._watch.cancelled_caught:
                        continue
            except RecordError as error:
                self._missed(error)
                await trio.sleep(self._options.timing.renew)
                continue
            self._came_back()
            before = handover.role
            handover.seen(lease, version, trio.current_time(), swapped=done)
            await self._turn(before)

    async def _turn(self, before: Role) -> None:
        role = self.handover.role
        if role is before:
            return
        if role is Role.LEAVING:
            wanted = self.handover.lease.wanted or "another node"
            why = "the lease was lost" if self.handover.deposed else f"{wanted} is to take over"
            self._tell("leaving", f"leaving the volume: {why}")
            if self.handover.deposed:
                self.silence()
            self._serving.cancel()
        elif role is Role.TAKING:
            # one that is not warm by then is no faster than one that is started for it
            self._warming.deadline = trio.current_time() + WARM_PATIENCE
        await self._notify()

    def _missed(self, error: RecordError) -> None:
        self.handover.missed(trio.current_time())
        if self._answers:
            self._answers = False
            self._report.warn("records_away", f"{error}; whoever serves goes on", reason=str(error))

    def _came_back(self) -> None:
        if not self._answers:
            self._answers = True
            self._report.emit("records_back", "the record server answers again")

    async def _announce(self, share: Tenant) -> None:
        handover, volume = self.handover, self._paths.volume
        while True:
            status = await share.status()
            presence = Presence(
                node=self._options.node,
                instance=handover.instance,
                state=status.state,
                summary=msgspec.json.encode(status).decode(),
                connections=self._connections(),
                peer=self._peer,
            )
            with contextlib.suppress(RecordError):
                await trio.to_thread.run_sync(self._present.announce, volume, presence, abandon_on_cancel=True)
                there = await trio.to_thread.run_sync(self._present.presences, volume, abandon_on_cancel=True)
                # a record server that was restarted does not know them all yet
                self._peers |= {one.node: one.peer for one in there if one.peer}
                handover.others = any(
                    one.node != self._options.node and one.state == "standby" and one.age < PRESENT for one in there
                )
            soon = self._exported and trio.current_time() - self._exported_at < SOON
            with trio.move_on_after(ANNOUNCE_SOON if soon else ANNOUNCE_EVERY):
                await self._changed.wait()
            self._changed = trio.Event()

    def _connections(self) -> tuple[str, ...]:
        if not self._exported or self._options.address is None:
            return ()
        ours = self._options.address.address
        found = None
        with contextlib.suppress(NetworkError):
            found = self._network.clients()
        if found is None:
            return tuple(one.name for one in established(self._options.port) if one.local == ours)
        # behind a gate all sockets have one address
        return tuple(Connection(ours, client.address, port).name for client in found for port in client.ports)

    async def _tickle(self, before: str) -> None:
        """Have the clients of the node that served before connect to this one; after a repair those of its own, whose
        connections ended in silence.

        Those of nodes that served earlier, too: one that served for a moment only may not have told whom it met, and a
        client keeps its port. Without a word it would wait for the answer of a server that is gone for a minute.
        """
        names = set(self._clients)
        if before != self._options.node:
            with contextlib.suppress(RecordError):
                there = await trio.to_thread.run_sync(
                    self._present.presences, self._paths.volume, abandon_on_cancel=True
                )
                names |= {name for one in there for name in one.connections}
        for pause in TICKLE_AFTER:
            await trio.sleep(pause)
            if not self._exported:
                return
            with contextlib.suppress(OSError):
                self._network.inside(partial(tickle, map(Connection.parse, names), self._options.port))

    async def _answer_peers(self, share: Tenant) -> None:
        """At the address by which the record server knows this node."""
        handover = self.handover
        host = ""
        while not host:
            await trio.sleep(0.2)
            host = await trio.to_thread.run_sync(lambda: self._present.local_host)

        def alive() -> Alive:
            return Alive(instance=handover.instance, serving=handover.role is Role.SERVING and self._exported)

        try:
            async with trio.open_nursery() as nursery:
                self._peer = await nursery.start(answer_peers, host, self._key, alive, share.header)
        except* EngineError as error:
            self._report.warn("no_peers", f"other nodes cannot ask this one: {leaves(error)[0]}")

    def _whom(self) -> str:
        """Where the holder answers, when that is another node."""
        holder = self.handover.lease.holder
        return "" if holder == self._options.node else self._peers.get(holder, "")

    async def _learn_key(self, share: Tenant) -> None:
        """Whoever takes over an encrypted volume has no time to derive its key, and should know that it can."""
        pause = LEARN_AGAIN
        while True:
            await trio.sleep(pause)
            address = self._whom()
            if self.handover.role is Role.STANDBY and address and share.needs_header:
                header = await ask_header(address, self._key, self._paths.volume)
                if header:
                    await share.learn(header)
                    # a passphrase that does not open it now will hardly do so soon
                    pause = LEARN_AGAIN if not share.needs_header else 15 * LEARN_AGAIN

    async def _ask_holder(self) -> None:
        handover = self.handover

        def heard(alive: Alive) -> bool:
            if alive.serving:
                handover.heard(alive.instance, trio.current_time())
            return self._whom() == address

        while True:
            address = self._whom()
            if address:
                await ask_peer(address, self._key, self._paths.volume, heard)
            await trio.sleep(PEER_AGAIN)

    async def _hold_address(self, address: FloatingAddress) -> None:
        """The kernel forgets it soon after we stop to ask for it."""
        since = 0.0
        again: list[float] = []
        while True:
            if not self._exported:
                again = list(ARP_AGAIN)
                since = trio.current_time()
            else:
                try:
                    self._hold(address)
                except (FloatingAddressError, OSError) as error:
                    self._report.warn("address_failed", str(error))
                if again and trio.current_time() - since > again[0]:
                    again.pop(0)
                    self._announce_address(address)
            soon = self._exported and again and again[0] < ARP_SOON
            await trio.sleep(0.1 if soon else ADDRESS_EVERY)

    async def _news(self) -> None:
        async with self._turned:
            with trio.move_on_after(0.5):
                await self._turned.wait()

    async def _notify(self) -> None:
        async with self._turned:
            self._turned.notify_all()

    def _tell(self, event: str, message: str, **fields: Any) -> None:
        failover = self.handover.lease.failover
        self._report.emit(event, message, node=self._options.node, failover=failover, **fields)


async def _by_the_server(networks: Sequence[str]) -> None:
    """Until there is a network nobody is served."""


def _ours(caught: Exception) -> Exception | None:
    """The error in it, None when one of them is a defect."""
    found = leaves(caught)
    return found[0] if all(isinstance(error, Exception) and is_ours(error) for error in found) else None  # type: ignore[return-value]
