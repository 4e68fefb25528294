"""Where a volume's things are: what must last below the data directory, what dies with a boot below /run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

DEFAULT_DATA_DIR = Path("/var/lib/share-manager")
RUN_ROOT = Path("/run/share-manager")


@dataclass(frozen=True)
class VolumePaths:
    """One volume in one data directory.

    Socket names are short: with the longest volume name (63) a path must stay below the 108 bytes of sun_path.
    """

    data_dir: Path
    volume: str

    @cached_property
    def directory(self) -> Path:
        return self.data_dir / "volumes" / self.volume

    @property
    def record(self) -> Path:
        return self.directory / "record.json"

    @property
    def secret(self) -> Path:
        return self.directory / "secret"

    @property
    def formatting(self) -> Path:
        return self.directory / "formatting"

    @property
    def encryption(self) -> Path:
        """Exists for a volume that has a LUKS header, or is just being given one."""
        return self.directory / "encryption.json"

    @property
    def drop_recovery(self) -> Path:
        """While it exists the clients' records on the volume are those of another past: the next serve drops them."""
        return self.directory / "drop-recovery"

    @property
    def inherited_uuids(self) -> Path:
        """While it exists the filesystem may still have another volume's UUID: one of those in it, one a line."""
        return self.directory / "inherited-uuids"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def replica(self, name: str) -> Path:
        return self.directory / "replicas" / name

    @cached_property
    def run(self) -> Path:
        token = hashlib.sha256(f"{self.data_dir.resolve()}\0{self.volume}".encode()).hexdigest()[:8]
        return RUN_ROOT / f"{self.volume}-{token}"

    @property
    def state(self) -> Path:
        return self.run / "state.json"

    @property
    def control(self) -> Path:
        return self.run / "control.sock"

    @property
    def engine_control(self) -> Path:
        return self.run / "engine.sock"

    @property
    def block_file(self) -> Path:
        return self.run / "block"

    @property
    def mountpoint(self) -> Path:
        return self.run / "mnt"

    @property
    def browsing(self) -> Path:
        """A directory for each snapshot that is being looked at, by whom."""
        return self.run / "snapshots"

    @property
    def ganesha(self) -> Path:
        # short, for its bus socket
        return self.run / "nfs"

    def replica_socket(self, name: str) -> Path:
        return self.run / f"{name}.sock"
