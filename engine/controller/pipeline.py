"""The way of a request: from a frontend to the core, from there to the replicas' sockets, and its answer's way back.

All that a request needs each time, and nothing else: with `core`, `stream` and the frontend's session this is what is
compiled (see setup.py), so no task is started and nothing awaited here.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import Any, Final

from crc32c import crc32c

from engine.controller.actions import Action
from engine.controller.core import MEND, PING, READ_LAYER, TRACK, Core, Send
from engine.controller.stats import Operation
from engine.controller.stream import Stream
from engine.errors import EngineError
from engine.ops import FLUSH, READ, UNMAP, WRITE, BlockRequest, Data
from engine.wire import messages
from engine.wire.frame import REPLY, WRITTEN, decode_written, encode_header

# the driver's own calls count from CALL on (see ReplicaConnection); the core's requests never get here
_FIRST_ODD: Final = 1 << 61
_OK: Final = 0
# a larger payload is not copied
_JOINED: Final = 16 << 10


class Pipeline:
    """`act` carries out what is rare, `stirred` is called after that, and after every round of a core that
    drains or holds.

    `ping` sends a ping another way than over the replica's stream, if there is one: then it returns True.
    """

    def __init__(
        self,
        core: Core,
        act: Callable[[Action], None],
        stirred: Callable[[], None],
        ping: Callable[[Stream, int, bytes], bool],
    ) -> None:
        self.core = core
        self._streams: dict[int, Stream] = {}
        self.operations = {op: Operation() for op in (READ, WRITE, FLUSH, UNMAP)}
        self._act = act
        self._stirred = stirred
        self._ping = ping
        self._routes: dict[int, list[Stream]] = {}

    def connect(self, stream: Stream) -> None:
        """Requests for its replica go this way from now on."""
        self._streams[stream.bit] = stream
        self._routes.clear()

    def disconnect(self, bit: int) -> None:
        self._streams.pop(bit, None)
        self._routes.clear()

    def submit(self, request: BlockRequest) -> None:
        """Queue a request; it is on its way after `drain`."""
        self.core.submit(request.op, request.offset, request.length, request.payload, request)

    def drain(self) -> None:
        """Carry out what the core decided."""
        core = self.core
        while core.outbox or core.actions or core.replies:
            if core.outbox:
                sends, core.outbox = core.outbox, []
                self._send(sends)
            if core.replies:
                self._reply()
            if core.actions:
                actions, core.actions = core.actions, []
                for action in actions:
                    self._act(action)
                self._stirred()
        if core.draining or core.holding:
            self._stirred()

    def _reply(self) -> None:
        core = self.core
        replies, core.replies = core.replies, []
        now = time.perf_counter()
        for token, error, data in replies:
            request: BlockRequest = token
            self.operations[request.op].add(now - request.started, request.length, error)
            request.finish(error, data)

    def _send(self, sends: list[Send]) -> None:
        touched: dict[Stream, None] = {}
        # small frames in a row for the same replicas are put together once for all of them
        joined: list[Data] = []
        destination = 0
        for mask, op, seq, offset, length, payload in sends:
            kind = type(payload)
            body = payload if kind is bytes or kind is memoryview else _body(op, payload)
            size = len(body)
            header = encode_header(op, 0, seq, offset, length, size, crc32c(body) if size else 0)
            if op == PING:
                for stream in self._route(mask):
                    if not self._ping(stream, seq, header):
                        stream.queue(header)
                        touched[stream] = None
                continue
            if mask != destination:
                self._queue(destination, joined, touched)
                joined = []
                destination = mask
            joined.append(header)
            if size > _JOINED:
                self._queue(destination, joined, touched)
                joined = []
                for stream in self._route(mask):
                    stream.queue(body)
            elif size:
                joined.append(body)
        self._queue(destination, joined, touched)
        for stream in touched:
            try:
                stream.pump()
            except OSError as broken:
                self.core.lost(stream.bit, f"cannot be written to: {broken.strerror}")

    def _queue(self, mask: int, pieces: list[Data], touched: dict[Stream, None]) -> None:
        if pieces:
            data = b"".join(pieces)
            for stream in self._route(mask):
                stream.queue(data)
                touched[stream] = None

    def _route(self, mask: int) -> list[Stream]:
        route = self._routes.get(mask)
        if route is None:
            route = self._routes[mask] = [stream for bit, stream in self._streams.items() if bit & mask]
        return route

    def readable(self, stream: Stream) -> None:
        """Take what has arrived to the core."""
        try:
            frames = stream.receive()
        except (OSError, EngineError) as error:
            stream.broken(error)
            return
        if frames is None:
            stream.broken(ConnectionResetError(errno.ECONNRESET, "the replica closed it"))
            return
        for frame in frames:
            kind, status, seq, _, _, payload = frame
            # the core is made anew while members are opened: take the one that counts now
            core = self.core
            try:
                if status != _OK or not kind & REPLY or seq >= _FIRST_ODD:
                    stream.odd(frame)
                elif kind == WRITTEN | REPLY:
                    for written in decode_written(payload):
                        core.answered(stream.bit, written, _OK)
                else:
                    core.answered(stream.bit, seq, _OK, payload)
            except EngineError as error:
                stream.broken(error)
            if stream.closed:
                return


_READ_HEAD: Final = messages.encode(messages.ReadLayer())


def _body(op: int, payload: Any) -> bytes:
    if op == MEND:
        snapshot, data = payload
        return messages.encode(messages.Mend(snapshot=snapshot, data=data))
    if op == TRACK:
        return messages.encode(messages.Track(names=payload))
    if op == READ_LAYER:
        return _READ_HEAD
    return messages.encode(messages.State(rebuilding=payload))
