"""Everything this package raises on purpose."""

from pathlib import Path


class GaneshaError(Exception):
    """Root of the errors of this package."""


class ConfigError(GaneshaError):
    """A value that cannot be used in a ganesha configuration; says which and why."""


class StartError(GaneshaError):
    """ganesha (or its message bus) did not come up.

    `reason` is one line, from the server's own log where it wrote one; `log` is the file with the rest.
    """

    def __init__(self, reason: str, *, log: Path | None = None, returncode: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.log = log
        self.returncode = returncode

    def __str__(self) -> str:
        return f"nfs-ganesha did not start: {self.reason}" + (f" (log: {self.log})" if self.log else "")


class NotReadyError(StartError):
    """It runs, says nothing of a failure, and does not serve in time either."""


class MissingProgramError(StartError):
    """A program that is needed is not installed."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"{program} not found; install the package {package}")
        self.program = program
        self.package = package


class StopError(GaneshaError):
    """A process survived SIGKILL for longer than the allowed time: it hangs in the kernel, on I/O that does not end."""

    def __init__(self, pid: int, seconds: float) -> None:
        super().__init__(f"process {pid} did not exit within {seconds:g} s of SIGKILL")
        self.pid = pid


class HealthError(GaneshaError):
    """The NFS server did not answer a call, or answered it with an error."""


class RpcError(HealthError):
    """The connection failed, or the peer's answer was not a well-formed accepted RPC reply."""


class Nfs4Error(HealthError):
    """An NFSv4 operation was answered with an error status (RFC 7530 section 13)."""

    def __init__(self, operation: str, status: int) -> None:
        super().__init__(f"{operation} answered with NFSv4 status {status}")
        self.operation = operation
        self.status = status


class DbusError(GaneshaError):
    """ganesha's control interface could not be reached, timed out, or refused a call."""


class UpdateError(DbusError):
    """ganesha refused a change of exports."""


class RecoveryError(GaneshaError):
    """The directory of client records could not be read or changed."""
