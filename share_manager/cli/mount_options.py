"""`share-manager mount-options`: on a client's node."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import Parameter

from share_manager.cli.common import Table, print_json
from share_manager.node.mountoptions import choose, parameter


def mount_options(
    *,
    kernel: Annotated[str | None, Parameter(help="Release of another kernel than this node's, as `uname -r`.")] = None,
    output: Table = "table",
) -> None:
    """Print the options with which this node's kernel should mount a share.

    For example:

    mount -t nfs4 -o $(share-manager mount-options) 192.0.2.10:/vol1 /mnt
    """
    chosen = choose(os.uname().release, parameter()) if kernel is None else choose(kernel, None)
    if output == "json":
        print_json(chosen)
    else:
        sys.stdout.write(f"{chosen.options}\n")
