"""`share-manager agent`: on a client's node, ends the connections that lead to where a share was.

After a change of node whatever has received nothing since then is taken for one that leads to the old place, again and
again until all have been heard from, or for a while.
"""

from __future__ import annotations

import itertools
import re

import msgspec
import trio

from engine.errors import RecordError
from engine.records import Lease, RecordsClient
from share_manager.errors import CommandError, InvalidValueError, MissingProgramError, TimeoutProblem
from share_manager.events import Reporter
from share_manager.node.sockets import end_one, forget_routes
from share_manager.share.commands import run

AGAIN = 0.25
FOR = 8.0
WATCH = 5.0
_LAST_RECEIVED = re.compile(r"\blastrcv:(\d+)")


class Watched(msgspec.Struct, frozen=True):
    """A volume, and where this node's mounts reach it."""

    volume: str
    address: str
    port: int


def stale(listing: str, since: float) -> list[int]:
    """Local ports in what `ss --tcp --numeric --no-header --info` lists, two lines for each connection, that have
    received nothing for at least `since` seconds."""
    found = []
    lines = listing.splitlines()
    for head, info in itertools.pairwise(lines):
        received = _LAST_RECEIVED.search(info)
        if head[:1].isspace() or received is None:
            continue
        if int(received[1]) >= since * 1000:
            local = next(word for word in head.split() if ":" in word)
            found.append(int(local.rpartition(":")[2]))
    return found


def moved(before: Lease | None, now: Lease) -> bool:
    """Whether another node, or the same anew, has begun to serve in between."""
    return before is not None and now.phase == "serving" and now.epoch > before.epoch


class Agent:
    def __init__(self, client: RecordsClient, watched: tuple[Watched, ...], report: Reporter) -> None:
        self._client = client
        self._watched = watched
        self._report = report

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for one in self._watched:
                nursery.start_soon(self._watch, one, self._client.another())

    async def _watch(self, one: Watched, client: RecordsClient) -> None:
        before: Lease | None = None
        version = ""
        away = False
        while True:
            try:
                lease, version = await trio.to_thread.run_sync(
                    client.read_lease, one.volume, version, WATCH, abandon_on_cancel=True
                )
            except RecordError as error:
                if not away:
                    self._report.warn("records_away", str(error), volume=one.volume)
                away = True
                await trio.sleep(1.0)
                continue
            away = False
            if moved(before, lease):
                ended = await end_stale(one, self._report)
                message = f"volume {one.volume} is on node {lease.holder}: {ended} connections ended"
                self._report.emit("switched", message, volume=one.volume, failover=lease.failover, ended=ended)
            if before is None or lease.phase == "serving":
                before = lease


async def end_stale(one: Watched, report: Reporter) -> int:
    """End the connections that lead to where a share was before this call; how many there were."""
    began, ended = trio.current_time(), 0
    await forget_routes(one.address, one.port)
    while trio.current_time() - began < FOR:
        try:
            _, listing = await run(
                *("ss", "--tcp", "--numeric", "--no-header", "--info", "state", "established"),
                *("dst", one.address, "dport", "=", f":{one.port}"),
                timeout=5,
            )
        except (CommandError, MissingProgramError, TimeoutProblem) as error:
            report.warn("not_switched", str(error), volume=one.volume)
            return ended
        ports = stale(listing, trio.current_time() - began)
        if not ports:
            break
        for port in ports:
            ended += await end_one(one.address, one.port, port)
        await trio.sleep(AGAIN)
    return ended


def parse_watched(text: str) -> Watched:
    """Of VOLUME=ADDRESS:PORT. Raises InvalidValueError."""
    volume, _, where = text.partition("=")
    address, _, port = where.rpartition(":")
    if not volume or not address or not port.isdigit():
        raise InvalidValueError("--volume", text, "write VOLUME=ADDRESS:PORT, such as vol1=192.0.2.10:2049")
    return Watched(volume, address.strip("[]"), int(port))
