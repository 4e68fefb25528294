"""The program's side of the conversation, with a client that is a directory."""

from __future__ import annotations

import io
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from share_manager.bench import files
from share_manager.bench.nfs.protocol import Answer, Hello, Mount, Request, Run, Stop, Unmount, decode, serve


class Directories:
    """Mounts are directories below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.mounted: set[str] = set()

    def mount(self, address: str, path: str, options: str) -> str:
        if path == "/none":
            raise OSError(f"no export {path}\nat {address}")
        place = self.root / path.strip("/")
        place.mkdir()
        self.mounted.add(str(place))
        return str(place)

    def run(self, place: str, workload: str, seconds: float, size: int, stopped: threading.Event) -> files.Load:
        return files.load(workload, Path(place), seconds, size, stopped.is_set)

    def unmount(self, place: str) -> None:
        shutil.rmtree(place)
        self.mounted.remove(place)


@pytest.fixture
def client(tmp_path: Path) -> Directories:
    return Directories(tmp_path)


def lines_of(*requests: Request) -> bytes:
    return b"".join(msgspec.json.encode(request) + b"\n" for request in requests)


def said(client: Directories, *requests: Request) -> Iterator[Answer]:
    lines, answers = io.BytesIO(lines_of(*requests)), io.BytesIO()
    serve(client, Hello(address="here", enter=("into", "it")), lines, answers)
    hello, *rest = answers.getvalue().splitlines()
    assert decode(hello, Hello) == Hello(address="here", enter=("into", "it"))
    return (decode(line, Answer) for line in rest)


def test_requests_are_answered_in_order(client: Directories, tmp_path: Path) -> None:
    place = str(tmp_path / "a")
    mount, run, unmount = said(
        client, Mount(1, "here", "/a", "vers=4.2"), Run(2, place, "create", 0.0, 1 << 20), Unmount(3, place)
    )
    assert mount == Answer(1, place=place)
    assert (run.id, run.error) == (2, "")
    assert run.load is not None
    assert run.load.operations == 0
    assert unmount == Answer(3)
    assert client.mounted == set()


def test_what_fails_is_one_line_and_the_next_goes_on(client: Directories, tmp_path: Path) -> None:
    failed, mount = said(client, Mount(1, "here", "/none", ""), Mount(2, "here", "/a", ""))
    assert failed == Answer(1, error="no export /none at here")
    assert mount == Answer(2, place=str(tmp_path / "a"))


def test_the_end_of_the_input_undoes_all(client: Directories) -> None:
    list(said(client, Mount(1, "here", "/a", ""), Mount(2, "here", "/b", "")))
    assert client.mounted == set()


def test_a_stop_ends_the_load_before_it_and_not_the_one_after_it(client: Directories, tmp_path: Path) -> None:
    place = str(tmp_path / "a")
    requests, wire = os.pipe()
    answers, output = os.pipe()
    with (
        open(requests, "rb") as lines,
        open(wire, "wb", buffering=0) as asking,
        open(answers, "rb") as replies,
        open(output, "wb") as sink,
    ):
        thread = threading.Thread(target=serve, args=(client, Hello(), lines, sink))
        thread.start()
        try:
            asking.write(lines_of(Mount(1, "here", "/a", ""), Run(2, place, "append", 60.0, 1 << 20)))
            deadline = time.monotonic() + 20
            while not (tmp_path / "a/append/log").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            asking.write(lines_of(Stop(), Run(3, place, "overwrite", 0.3, 1 << 20)))
            _, _, ended, after = (replies.readline() for _ in range(4))
        finally:
            asking.close()
            thread.join()
    first, second = decode(ended, Answer), decode(after, Answer)
    assert first.load is not None
    assert first.load.seconds < 40
    assert second.load is not None
    assert second.load.seconds >= 0.3
    assert client.mounted == set()
