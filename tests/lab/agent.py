"""The guest's side of the lab: runs programs and Python functions that the host asks for.

Stdlib only: it runs with the guest's own Python. One connection is one job, done in a forked child, because starting
a Python interpreter in a guest takes most of a second and a fork 50 ms. Lines of JSON both ways:

    host   {"op": "run", "argv": [...], "timeout": s} | {"op": "call", "module": m, "function": f, "arguments": {...}}
           | {"op": "kill", "group": pid of a job}
    guest  {"pid": n}, then {"event": {...}} any number of times, then {"result": ...} or {"error": {...}}
    host   "stop": the job should come to its end (see `tests.lab.workloads.channel`)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import traceback
from typing import Any

from tests.lab import workloads
from tests.lab.workloads import channel


def run(argv: list[str], timeout: float) -> dict[str, Any]:
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        partial = (error.stdout or b"").decode(errors="replace")
        return {"status": 124, "stdout": partial, "stderr": f"not done after {timeout} s"}
    return {
        "status": done.returncode,
        "stdout": done.stdout.decode(errors="replace"),
        "stderr": done.stderr.decode(errors="replace"),
    }


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        if request["op"] == "run":
            return {"result": run(request["argv"], request["timeout"])}
        if request["op"] == "kill":
            # not by the kill program: that of procps 4.0.2 takes a negative number for options
            os.killpg(request["group"], signal.SIGKILL)
            return {"result": None}
        function = getattr(importlib.import_module(request["module"]), request["function"])
        return {"result": function(**request["arguments"])}
    except BaseException as error:
        return {
            "error": {
                "type": type(error).__name__,
                "errno": getattr(error, "errno", None),
                "message": str(error),
                "traceback": traceback.format_exc(),
            }
        }


def handle(connection: socket.socket) -> None:
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    lines = connection.makefile("r")
    request = json.loads(lines.readline())
    channel.bind(connection)
    channel.send({"pid": os.getpid()})
    channel.send(answer(request))
    # a "stop" that nobody read would turn the closing into a reset, which can overtake the result
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(60)
    while connection.recv(4096):
        pass


def serve(port: int) -> None:
    for module in pkgutil.iter_modules(workloads.__path__):
        importlib.import_module(f"{workloads.__name__}.{module.name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.create_server(("0.0.0.0", port), backlog=32) as listener:
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                with contextlib.suppress(OSError, ValueError):
                    handle(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
