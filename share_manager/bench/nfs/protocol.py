"""What the bench and the program that has an NFS client say to each other: a line of JSON each (docs/bench.md).

The program says `Hello` first. Then each request gets one `Answer` with its number, except `Stop`, which gets none and
ends the load that runs early. At the end of its input the program undoes everything and ends.
"""

from __future__ import annotations

import queue
import sys
import threading
from typing import IO, Protocol, TypeVar

import msgspec

from share_manager.bench.files import Load


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """`address` is where servers listen so that the client reaches them; `enter` what their command lines begin with
    for that, such as an nsenter into a network namespace. With `error` there will be no client."""

    address: str = ""
    enter: tuple[str, ...] = ()
    error: str = ""


class Mount(msgspec.Struct, frozen=True, tag_field="op", tag="mount"):
    """`options` as mount.nfs takes them (nfs(5)), the port among them."""

    id: int
    address: str
    path: str
    options: str


class Run(msgspec.Struct, frozen=True, tag_field="op", tag="run"):
    """`workload` as in `share_manager.bench.files.load`, in the place that a mount gave."""

    id: int
    place: str
    workload: str
    seconds: float
    size: int


class Unmount(msgspec.Struct, frozen=True, tag_field="op", tag="unmount"):
    id: int
    place: str


class Stop(msgspec.Struct, frozen=True, tag_field="op", tag="stop"):
    pass


Request = Mount | Run | Unmount | Stop


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`place` of a mount; `load` of a run. What failed says why in `error`."""

    id: int
    error: str = ""
    place: str = ""
    load: Load | None = None


class Client(Protocol):
    """Whatever has an NFS client. `stopped` may be set by another thread while a load runs. All raise Exception."""

    def mount(self, address: str, path: str, options: str) -> str: ...

    def run(self, place: str, workload: str, seconds: float, size: int, stopped: threading.Event) -> Load: ...

    def unmount(self, place: str) -> None: ...


_Message = TypeVar("_Message")


def decode(line: bytes, kind: type[_Message]) -> _Message:
    """Raises msgspec.DecodeError."""
    return msgspec.json.decode(line, type=kind)


def say(message: Hello | Answer, output: IO[bytes]) -> None:
    output.write(msgspec.json.encode(message) + b"\n")
    output.flush()


def serve(client: Client, hello: Hello, requests: IO[bytes] | None = None, answers: IO[bytes] | None = None) -> None:
    """The program's side: answer until the input ends, then unmount what is mounted."""
    lines, output = requests or sys.stdin.buffer, answers or sys.stdout.buffer
    work: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
    stopped = threading.Event()
    places: list[str] = []

    def worker() -> None:
        while (request := work.get()) is not None:
            if isinstance(request, Stop):
                # the load before it is through, the next one shall run
                stopped.clear()
                continue
            try:
                answer = _answer(client, request, stopped, places)
            except Exception as error:
                answer = Answer(request.id, error=" ".join(str(error).split()) or repr(error))
            say(answer, output)

    say(hello, output)
    thread = threading.Thread(target=worker, name="nfs-client")
    thread.start()
    try:
        for line in lines:
            request = msgspec.json.decode(line, type=Request)
            if isinstance(request, Stop):
                stopped.set()
            work.put(request)
    finally:
        stopped.set()
        work.put(None)
        thread.join()
        for place in reversed(places):
            client.unmount(place)


def _answer(client: Client, request: Mount | Run | Unmount, stopped: threading.Event, places: list[str]) -> Answer:
    match request:
        case Mount():
            place = client.mount(request.address, request.path, request.options)
            places.append(place)
            return Answer(request.id, place=place)
        case Run():
            load = client.run(request.place, request.workload, request.seconds, request.size, stopped)
            return Answer(request.id, load=load)
        case Unmount():
            client.unmount(request.place)
            places.remove(request.place)
            return Answer(request.id)
