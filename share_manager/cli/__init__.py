"""The command line: what may be said, and the one place where errors become a line and an exit status."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from itertools import pairwise

from cyclopts import App, CycloptsError

from share_manager.errors import exit_status_of, is_ours, leaves
from share_manager.events import JsonSink, Reporter

COMMANDS = {
    "serve": ("share_manager.cli.serve:serve", "Serve a volume over NFSv4."),
    "share": ("share_manager.cli.share:share", "Serve a volume that several nodes share, or stand by for it."),
    "move": ("share_manager.cli.move:move", "Have another node serve a volume."),
    "attach": ("share_manager.cli.attach:attach", "Attach a volume as a block file."),
    "status": ("share_manager.cli.status:status", "Show volumes and their shares."),
    "allow": ("share_manager.cli.allow:allow", "Change who may use a share while it serves."),
    "stop": ("share_manager.cli.stop:stop", "Stop a share, or clear what a killed one left behind."),
    "volume": (
        "share_manager.cli.volume:app",
        "List, show, clone, resize, trim, import, salvage, scrub, re-key and delete volumes.",
    ),
    "replica": ("share_manager.cli.replica:app", "Add, remove, move, list and host replicas."),
    "records": ("share_manager.cli.records:app", "Keep the records of volumes that several nodes share."),
    "agent": ("share_manager.cli.agent:agent", "End a client node's connections to where a share was."),
    "mount-options": ("share_manager.cli.mount_options:mount_options", "Print how this node should mount a share."),
    "csi": ("share_manager.cli.csi:app", "Serve the Container Storage Interface of Kubernetes."),
    "controller": ("share_manager.cli.controller:controller", "Run the controllers in Kubernetes."),
    "pod": ("share_manager.cli.pod:app", "Run what is in share-manager's pods."),
    "snapshot": ("share_manager.cli.snapshot:app", "Take, list, read, delete and go back to snapshots."),
    "engine": ("share_manager.cli.engine:app", "Replace the engine of a volume in use."),
    "doctor": ("share_manager.cli.doctor:doctor", "Check whether this machine can serve volumes."),
    "bench": ("share_manager.bench:app", "Measure each layer of the data path."),
}
"""Loaded when they are used: `status` in a script should not wait for a web server's imports."""


def make_app(argv: Sequence[str]) -> App:
    app = App(
        name="share-manager",
        help="ReadWriteMany NFS shares on replicated block volumes.",
        help_epilogue=(
            "Exit status: 0 done, 1 failed while it ran, 2 wrong usage, 3 this machine lacks something, "
            "4 conflict (in use, or different), 5 no such volume, 6 storage (no space, no replica)."
        ),
        help_format="plaintext",
        version=version,
        help_on_error=False,
    )
    overview = not any(argument in COMMANDS for argument in argv)
    for order, (name, (target, summary)) in enumerate(COMMANDS.items()):
        # a summary given here would replace the command's own help
        app.command(target, name=name, sort_key=order, **({"help": summary} if overview else {}))
    return app


def version() -> str:
    try:
        return importlib.metadata.version("share-manager")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status. The only place that catches errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        result = make_app(words)(
            words,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except CycloptsError as error:
        return _tell(_one_line(str(error)).rstrip(".") + ": see `share-manager --help`", 2)
    except KeyboardInterrupt:
        return _tell("interrupted", 130)
    except Exception as caught:
        if os.environ.get("SHARE_MANAGER_DEBUG"):
            raise
        return _tell_error(caught, wants_json(words))
    finally:
        _close_output()


def wants_json(words: Sequence[str]) -> bool:
    return "--output=json" in words or ("--output", "json") in pairwise(words)


def _tell_error(caught: Exception, as_json: bool) -> int:
    found = leaves(caught)
    ours = [error for error in found if is_ours(error)]
    if ours:
        error, status = ours[0], exit_status_of(ours[0])
        line = _one_line(str(error) or type(error).__name__)
    else:
        error, status = found[0], 1
        line = (
            f"a defect of share-manager: {type(error).__name__}: {_one_line(str(error))}{_where(error)}; "
            "set SHARE_MANAGER_DEBUG=1 for the traceback and report it"
        )
    if as_json:
        # whoever reads steps learns how they ended
        Reporter(JsonSink()).emit("failed", line, level="error", error=type(error).__name__, exit_status=status)
    return _tell(line, status)


def _where(error: BaseException) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f" ({os.path.basename(traceback.tb_frame.f_code.co_filename)}:{traceback.tb_lineno})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tell(line: str, status: int) -> int:
    sys.stderr.write(f"share-manager: error: {line}\n")
    return status


def _close_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader has gone; the interpreter would complain when it flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run() -> None:
    sys.exit(main())
