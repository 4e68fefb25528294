"""A relay on a unix socket that looks for words in what passes."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TypedDict

from tests.lab.workloads import channel

_CHUNK = 1 << 18


class Heard(TypedDict):
    """`passed`: bytes, both ways. `words`: those that were among them."""

    passed: int
    words: list[str]


def listen(path: str, words: list[str]) -> Heard:
    """Whoever connects to `path` from now on is relayed, until told to stop. Emits `listening`."""
    wanted = {word: word.encode() for word in words}
    heard: Heard = {"passed": 0, "words": []}
    overlap = max(map(len, wanted.values())) - 1
    lock = threading.Lock()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        tail = b""
        try:
            while chunk := source.recv(_CHUNK):
                sink.sendall(chunk)
                seen = tail + chunk
                with lock:
                    heard["passed"] += len(chunk)
                    heard["words"] += [w for w, raw in wanted.items() if raw in seen and w not in heard["words"]]
                tail = seen[-overlap:]
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    real = f"{path}.real"
    os.rename(path, real)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(0.2)
        channel.emit("listening")
        while not channel.stopping():
            try:
                near, _ = listener.accept()
            except TimeoutError:
                continue
            near.setblocking(True)
            far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            far.connect(real)
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()
    os.rename(real, path)
    return heard
