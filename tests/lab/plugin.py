"""The driver's node plugin in a guest, with a socket on this machine that leads to it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.lab.guest import Guest, Job
from tests.lab.workloads import daemon, relay
from tests.share_manager.csi.caller import Caller

PROGRAM = Path(sys.executable).with_name("share-manager")
_ports = itertools.count(9300)


class NodePlugin:
    """`close` ends it as kubelet would; `kill` does not ask. Its mounts stay in both cases."""

    def __init__(
        self,
        guest: Guest,
        *,
        name: str = "",
        kubeconfig: Path | None = None,
        namespace: str = "share-manager",
        patience: float = 120.0,
    ) -> None:
        self._guest = guest
        self._port = next(_ports)
        self.name = name or guest.name
        self.socket = guest.directory / f"csi-{self._port}.sock"
        self._inside = f"/run/csi-{self._port}.sock"
        self._kubeconfig = kubeconfig or _nowhere(guest)
        self._namespace = namespace
        self._patience = patience
        self._job: Job[int] | None = None
        self._relay: Job[int] | None = None
        self._listener: socket.socket | None = None

    @property
    def log(self) -> str:
        return self._guest.run("cat", f"/run/csi-{self._port}.log", check=False).stdout

    def start(self) -> NodePlugin:
        runs = self.log.count('"ready"') + 1
        self._job = self._guest.spawn(
            daemon.run,
            argv=[
                *(str(PROGRAM), "csi", "node", "--endpoint", f"unix://{self._inside}", "--node-name", self.name),
                *("--kubeconfig", str(self._kubeconfig), "--namespace", self._namespace),
                *("--patience", str(self._patience)),
            ],
            log=f"/run/csi-{self._port}.log",
        )
        if self._relay is None:
            self._relay = self._guest.spawn(relay.relay, port=self._port, path=self._inside)
            self._relay.wait_event("relaying")
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.socket))
            self._listener.listen()
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        end = time.monotonic() + 60
        while self.log.count('"ready"') < runs:
            assert not self._job.done, f"the plugin ended: {self.log}"
            assert time.monotonic() < end, f"the plugin does not come up: {self.log}"
            time.sleep(0.1)
        return self

    def tell(self) -> None:
        """Shown with a test that failed."""
        print(self.log)

    @contextlib.contextmanager
    def caller(self) -> Iterator[Caller]:
        with Caller(self.socket) as caller:
            yield caller

    def kill(self) -> None:
        assert self._job is not None
        self._guest.kill_group(self._pid())
        self._job.result()
        self._job = None

    def _pid(self) -> int:
        return int([json.loads(line) for line in self.log.splitlines() if '"ready"' in line][-1]["pid"])

    def stop(self) -> int:
        """Its exit status."""
        assert self._job is not None
        job, self._job = self._job, None
        return job.finish()

    def close(self) -> None:
        if self._job is not None and self._guest.alive and not self._job.done:
            self.kill()
        if self._relay is not None and self._guest.alive:
            self._relay.kill()
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        self.socket.unlink(missing_ok=True)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = self._guest.lab.connect(self._guest.address, self._port, 10.0)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=relay.pump, args=(one, other), daemon=True).start()


def _nowhere(guest: Guest) -> Path:
    """Access to an API server that does not answer: a node mounts all the same."""
    path = guest.directory / "kubeconfig"
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority": "/etc/ssl/certs/ca-certificates.crt"}
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": os.urandom(8).hex()}}],
            }
        )
    )
    return path
