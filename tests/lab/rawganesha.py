"""A plain directory exported by nfs-ganesha, without the product: what the lab's own tests use.

It can be told to lose the clients' state at a restart, so that the lab can prove that it notices.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.lab.mounts import Export
from tests.lab.network import Lab

CONFIG = """
NFS_CORE_PARAM {{
    Protocols = 4; NFS_Port = {port}; Bind_addr = {address}; Enable_NLM = false; Enable_RQUOTA = false;
}}
NFSv4 {{
    Minor_Versions = 0, 1, 2; Lease_Lifetime = {lease}; Grace_Period = {grace}; Delegations = false;
    Only_Numeric_Owners = true; RecoveryBackend = fs; RecoveryRoot = "{state}/recovery";
    Server_Scope = "{name}"; Server_Owner = "{name}";
}}
EXPORT {{
    Export_Id = 1; Path = "{directory}"; Pseudo = "/{name}"; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }}
}}
LOG {{ Default_Log_Level = EVENT; }}
"""


class RawGanesha:
    def __init__(self, lab: Lab, name: str, *, port: int = 12049, lease: int = 10, grace: int = 15) -> None:
        self.lab = lab
        self.state = lab.directory / f"raw-{name}"
        self.directory = self.state / "export"
        self.export = Export(lab.server, port, f"/{name}")
        self._settings = {"name": name, "port": port, "lease": lease, "grace": grace, "address": lab.server}
        self._starts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, budget: float = 20.0) -> RawGanesha:
        self._starts += 1
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.state / "recovery").mkdir(exist_ok=True)
        config = self.state / "ganesha.conf"
        config.write_text(CONFIG.format(state=self.state, directory=self.directory, **self._settings))
        log = self.state / f"log-{self._starts}"
        # a number of its own for every start: otherwise two starts within a second share their write verifier
        argv: list[str | Path] = [
            "ganesha.nfsd",
            "-F",
            "-f",
            config,
            "-L",
            log,
            "-p",
            self.state / "pid",
            "-E",
            str(self._starts),
        ]
        with (self.state / "output").open("ab") as output:
            self._process = self.lab.popen(argv, stdout=output, stderr=output)
        end = time.monotonic() + budget
        while not log.exists() or "NFS SERVER INITIALIZED" not in log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > end:
                detail = log.read_text(errors="replace") if log.exists() else (self.state / "output").read_text()
                raise RuntimeError(f"ganesha did not start:\n{detail[-2000:]}")
            time.sleep(0.02)
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            os.kill(self._process.pid, how)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def forget_clients(self) -> None:
        """Drop the recovery records, so that no client may reclaim anything."""
        shutil.rmtree(self.state / "recovery")

    def close(self) -> None:
        self.stop()
