"""The program that has an NFS client, as the bench talks to it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from share_manager.bench.files import Load
from share_manager.bench.nfs.protocol import Answer, Hello, Mount, Request, Run, Stop, Unmount, decode
from share_manager.bench.processes import UnavailableError, end

LOCAL = (sys.executable, "-m", "share_manager.bench.nfs.local")
HELLO_SECONDS = 120.0
REQUEST_SECONDS = 60.0
END_SECONDS = 60.0

_Message = TypeVar("_Message")


class NfsClient:
    """`address` and `enter` as in `Hello`. One request at a time."""

    def __init__(self, process: trio.Process, said: Path) -> None:
        self.address = ""
        self.enter: tuple[str, ...] = ()
        self._process = process
        self._said = said
        self._numbers = itertools.count(1)
        self._buffer = bytearray()

    async def greet(self) -> None:
        """Wait until it is ready. Raises UnavailableError."""
        hello = await self._receive(Hello, HELLO_SECONDS)
        if hello.error:
            raise UnavailableError(hello.error)
        self.address, self.enter = hello.address, hello.enter

    async def mount(self, path: str, options: str) -> str:
        """The place where it is. Raises UnavailableError."""
        number = next(self._numbers)
        return (await self._ask(number, Mount(number, self.address, path, options), REQUEST_SECONDS)).place

    async def run(self, place: str, workload: str, seconds: float, size: int) -> Load:
        """Raises UnavailableError."""
        number = next(self._numbers)
        try:
            answer = await self._ask(number, Run(number, place, workload, seconds, size), seconds + REQUEST_SECONDS)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self._send(Stop())
            raise
        if answer.load is None:
            raise UnavailableError(f"the NFS client did not measure {workload}")
        return answer.load

    async def unmount(self, place: str) -> None:
        """Raises UnavailableError."""
        number = next(self._numbers)
        await self._ask(number, Unmount(number, place), REQUEST_SECONDS)

    async def _send(self, request: Request) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._process.stdin.send_all(msgspec.json.encode(request) + b"\n")

    async def _ask(self, number: int, request: Request, patience: float) -> Answer:
        await self._send(request)
        while True:
            answer = await self._receive(Answer, patience)
            # an answer to a request whose asker was cancelled may still come
            if answer.id == number:
                break
        if answer.error:
            raise UnavailableError(answer.error)
        return answer

    async def _receive(self, kind: type[_Message], patience: float) -> _Message:
        assert self._process.stdout is not None
        with trio.move_on_after(patience):
            while b"\n" not in self._buffer:
                data = await self._process.stdout.receive_some()
                if not data:
                    raise UnavailableError(f"the NFS client ended: {self._why()}")
                self._buffer += data
            line, _, rest = bytes(self._buffer).partition(b"\n")
            self._buffer = bytearray(rest)
            try:
                return decode(line, kind)
            except msgspec.DecodeError as error:
                raise UnavailableError(f"the NFS client said {line[:80]!r}: {error}") from None
        raise UnavailableError(f"the NFS client gave no answer within {patience:g} s: {self._why()}")

    def _why(self) -> str:
        lines = [line.strip() for line in self._said.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self._process.poll()}"


@contextlib.asynccontextmanager
async def nfs_client(command: str | None, work: Path) -> AsyncIterator[NfsClient]:
    """Start the program and wait for its greeting; its standard error goes to a file in `work`.

    Raises UnavailableError.
    """
    argv = shlex.split(command) if command else list(LOCAL)
    said = work / "nfs-client.err"
    with said.open("wb") as err:
        try:
            # a session of its own, as all servers: see `serving`
            process = await trio.lowlevel.open_process(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err, start_new_session=True
            )
        except OSError as error:
            raise UnavailableError(f"the NFS client {argv[0]}: {os.strerror(error.errno or 0)}") from None
    assert process.stdin is not None
    try:
        client = NfsClient(process, said)
        await client.greet()
        yield client
    finally:
        with trio.CancelScope(shield=True):
            await process.stdin.aclose()
            with trio.move_on_after(END_SECONDS):
                await process.wait()
            await end(process, END_SECONDS)
