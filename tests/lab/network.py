"""The lab's network: one namespace with a bridge. Guests hang on it by taps, servers run inside it."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TypeVar

from tests.lab import leftovers

SUBNET = "10.99.0"
SERVER = f"{SUBNET}.1"
CLONE_NEWNET = 0x40000000
ISLAND = "br1"

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


class Lab:
    """A directory, a network namespace of the same name, and what runs in them.

    Both names hold the process id, so labs of parallel sessions never meet, and everything that is started here
    carries the directory in its environment, so `leftovers` finds it. Address `SERVER` is the bridge's.
    """

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{leftovers.PREFIX}{os.getpid()}-", dir="/tmp"))
        self.namespace = leftovers.namespace_of(self.directory)
        self.mark = leftovers.mark_of(self.directory)
        self.server = SERVER
        self._taps = 0
        self._island = False
        self._fd = -1

    def __enter__(self) -> Lab:
        try:
            _ip("netns", "add", self.namespace)
            self._fd = os.open(Path("/run/netns", self.namespace), os.O_RDONLY | os.O_CLOEXEC)
            self._inside("link", "set", "lo", "up")
            self._add_bridge("br0", 1)
            self._inside("address", "add", f"{SERVER}/24", "dev", "br0")
            self._inside("link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if Path("/run/netns", self.namespace).exists():
            _ip("netns", "delete", self.namespace)

    def discard(self) -> None:
        """Remove the lab's directory and whatever is left of it."""
        leftovers.remove(self.directory, self.mark)
        shutil.rmtree(self.directory, ignore_errors=True)

    def left(self) -> list[leftovers.Leftover]:
        """What of it is still on the machine."""
        return leftovers.find(self.directory, self.mark)

    def tap(self) -> str:
        """A new tap on the bridge."""
        self._taps += 1
        name = f"tap{self._taps}"
        self._inside("tuntap", "add", "dev", name, "mode", "tap")
        self._inside("link", "set", name, "master", "br0", "up")
        return name

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, leftovers.TOKEN: str(self.directory), **(extra or {})}

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program in the namespace, in a session (so a process group) of its own.

        `nsenter`, because `ip netns exec` takes a mount namespace of its own too, which pins mounts and loop devices.
        """
        return subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=self.environment(env),
            cwd=cwd,
            start_new_session=True,
        )

    def run(
        self, argv: Sequence[str | Path], *, timeout: float = 60.0, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *map(str, argv)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            cwd=cwd,
            timeout=timeout,
            check=False,
        )

    def connect(self, address: str, port: int, timeout: float) -> socket.socket:
        """A TCP connection from inside the namespace. Raises OSError."""
        return self.inside(lambda: socket.create_connection((address, port), timeout=timeout))

    def inside(self, act: Callable[[], T]) -> T:
        """What that returns, done in the namespace: sockets that it makes belong there. Raises what it raises."""
        outcome: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            # setns moves the calling thread only, and this one ends here
            try:
                if _libc.setns(self._fd, CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
                outcome.append(act())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="lab-inside")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return outcome[0]

    def cut_off(self, *links: str) -> None:
        """These links of the bridge reach one another still, and nobody else."""
        if not self._island:
            self._add_bridge(ISLAND, 2)
            self._inside("link", "set", ISLAND, "up")
            self._island = True
        for link in links:
            self._inside("link", "set", link, "master", ISLAND)

    def join(self, *links: str) -> None:
        """Undo `cut_off`."""
        for link in links:
            self._inside("link", "set", link, "master", "br0")

    def _add_bridge(self, name: str, number: int) -> None:
        # Without an address of its own a bridge has the lowest of its links: who was cut off with that link would still
        # be heard by the servers here, at the address that it knows them by, and not be answered.
        mac = f"02:00:00:00:00:{number:02x}"
        self._inside("link", "add", name, "address", mac, "type", "bridge", "forward_delay", "0")

    def _inside(self, *arguments: str) -> None:
        _ip("-n", self.namespace, *arguments)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
