"""`share-manager allow`."""

from __future__ import annotations

from typing import Annotated

import trio
from cyclopts import Parameter

from share_manager import units
from share_manager.cli.common import DEFAULT_DATA_DIR, DataDir, Steps, VolumeName, reporter
from share_manager.errors import UsageError
from share_manager.share.control import ask
from share_manager.share.requests import AllowClients, ClientsAllowed
from share_manager.volumes import find_volume


def allow(
    volume: VolumeName,
    /,
    *,
    set_: Annotated[
        list[str] | None,
        Parameter(
            name="--set", consume_multiple=True, negative=(), help="Networks whose clients may use it, and no others."
        ),
    ] = None,
    everyone: Annotated[bool, Parameter(negative=(), help="Let everyone use it.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    output: Steps = "text",
) -> None:
    """Change who may use a share while it serves, until it is served anew.

    A client that has mounted it and is not allowed any more gets nothing from now on.

    For example:

    share-manager allow vol1 --set 10.0.0.0/8 192.168.7.20/32
    """
    if bool(set_) == everyone:
        raise UsageError("say who may use it: networks with --set, or --everyone")
    networks = tuple(units.parse_network(network, "--set") for network in set_ or ())
    paths = find_volume(data_dir, units.parse_name(volume))
    done = trio.run(ask, paths, AllowClients(networks=networks), ClientsAllowed)
    who = ", ".join(done.networks) or "everyone"
    reporter(output).emit("allowed", f"clients that may use {volume}: {who}", networks=list(done.networks))
