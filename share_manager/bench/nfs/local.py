"""The NFS client of this kernel, as a program that the bench starts when it is given no other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from share_manager.bench import files
from share_manager.bench.nfs.protocol import Hello, say, serve

ADDRESS = "127.0.0.1"


def has_nfs_client() -> bool:
    """Whether this kernel can mount NFSv4, its module loaded if there is one."""
    if modprobe := shutil.which("modprobe"):
        subprocess.run([modprobe, "--quiet", "nfsv4"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return any(line.split()[-1] == "nfs4" for line in Path("/proc/filesystems").read_text().splitlines())


def _run(*argv: str) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{argv[0]}: {done.stderr.strip() or f'exit status {done.returncode}'}")


class LocalClient:
    def mount(self, address: str, path: str, options: str) -> str:
        place = tempfile.mkdtemp(prefix="share-manager-bench-")
        try:
            _run("mount", "-t", "nfs4", "-o", options, f"{address}:{path}", place)
        except BaseException:
            Path(place).rmdir()
            raise
        return place

    def run(self, place: str, workload: str, seconds: float, size: int, stopped: threading.Event) -> files.Load:
        return files.load(workload, Path(place), seconds, size, stopped.is_set)

    def unmount(self, place: str) -> None:
        try:
            _run("umount", place)
        except OSError:
            # its server is gone: nothing that is still to be written will ever be
            _run("umount", "--force", "--lazy", place)
        Path(place).rmdir()


if __name__ == "__main__":
    if has_nfs_client():
        serve(LocalClient(), Hello(address=ADDRESS))
    else:
        say(Hello(error="this kernel has no NFSv4 client: give one with --nfs-client"), sys.stdout.buffer)
