"""The bench's side: with programs that are not what they should be, and with this kernel's own client."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import trio

from share_manager.bench.nfs.client import nfs_client
from share_manager.bench.nfs.local import has_nfs_client
from share_manager.bench.processes import UnavailableError


def program(text: str) -> str:
    return shlex.join([sys.executable, "-c", text])


HELLO = 'print(\'{"address": "10.0.0.1", "enter": ["nsenter"]}\', flush=True)\n'
ANSWERS = (
    HELLO
    + """
import sys, json, time
for line in sys.stdin:
    asked = json.loads(line)
    if asked["op"] == "mount":
        print(json.dumps({"id": asked["id"] - 1}))
        print(json.dumps({"id": asked["id"], "place": asked["path"] + asked["options"]}), flush=True)
    elif asked["op"] == "run" and asked["seconds"] < 10:
        print(json.dumps({"id": asked["id"], "load": [3, 1.5, 4096]}), flush=True)
    elif asked["op"] == "stop":
        print(json.dumps({"id": 2, "load": [1, 1.0, 1]}), flush=True)
    elif asked["op"] == "unmount":
        print(json.dumps({"id": asked["id"], "error": "in use"}), flush=True)
"""
)


async def test_it_says_where_servers_listen_and_answers_what_was_asked(tmp_path: Path) -> None:
    async with nfs_client(program(ANSWERS), tmp_path) as client:
        assert (client.address, client.enter) == ("10.0.0.1", ("nsenter",))
        assert await client.mount("/a", "-o") == "/a-o"
        with trio.move_on_after(0.1) as scope:
            await client.run("/a", "append", 20, 1)
        assert scope.cancelled_caught
        assert tuple(await client.run("/a", "append", 1, 1)) == (3, 1.5, 4096)
        with pytest.raises(UnavailableError, match="in use"):
            await client.unmount("/a")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("/no/such/program --now", "No such file"),
        (program('print(\'{"error": "no guest"}\')'), "no guest"),
        (program("print('welcome')"), "welcome"),
        (program("import sys; sys.exit('broken')"), "broken"),
        (program("raise SystemExit(3)"), "exit status"),
        (program(HELLO), "ended"),
    ],
)
async def test_a_program_that_is_none_is_named_with_a_reason(tmp_path: Path, command: str, reason: str) -> None:
    with pytest.raises(UnavailableError, match=reason):
        async with nfs_client(command, tmp_path) as client:
            await client.mount("/a", "")


async def test_this_kernel_is_the_default(tmp_path: Path) -> None:
    if has_nfs_client():
        async with nfs_client(None, tmp_path) as client:
            assert (client.address, client.enter) == ("127.0.0.1", ())
    else:
        with pytest.raises(UnavailableError, match="--nfs-client"):
            async with nfs_client(None, tmp_path):
                pass
