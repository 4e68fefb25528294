"""Decisions about volumes and nodes, without I/O: what a publication changes, what is listed, how much room is left."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from share_manager.controllers.placement import DISK, unusable
from share_manager.csi.errors import AbortedError, AlreadyExistsError, FailedPreconditionError, InvalidArgumentError
from share_manager.csi.names import is_volume_id
from share_manager.kube.resources import Attachment, ShareManager, StorageNode

T = TypeVar("T")


def attach(
    share: ShareManager, node: str, wanted: Attachment, asked: Iterable[str], *, single_node: bool
) -> Attachment | None:
    """The attachment that there is, None when it is to be made. One that was made with what is `asked` for now stays as
    it is, whatever this release and the node's new kernel would add: it may be mounted.

    Raises AlreadyExistsError, FailedPreconditionError.
    """
    others = sorted(name for name in share.spec.attachments if name != node)
    if single_node and others:
        raise FailedPreconditionError(
            f"volume {share.name} is for one node at a time, and is published on {', '.join(others)}: it is free when "
            "the pods there have ended, or that node was deleted"
        )
    found = share.spec.attachments.get(node)
    if found is None:
        return None
    lacking = set(asked) - set(found.nfs_options.split(","))
    if lacking or found.read_only != wanted.read_only:
        raise AlreadyExistsError(
            f"volume {share.name} is published on {node} already, {_how(found)}; asked for: {_how(wanted)}"
        )
    return found


def _how(attachment: Attachment) -> str:
    return f"{'only to read' if attachment.read_only else 'to read and write'}, mounted with {attachment.nfs_options}"


def room(nodes: Iterable[StorageNode], replicas: int) -> int:
    """Bytes of the largest volume that can be made now: each of its replicas is on another node."""
    free = sorted((_free(node) for node in nodes), reverse=True)
    return free[replicas - 1] if 0 < replicas <= len(free) else 0


def _free(node: StorageNode) -> int:
    if unusable(node):
        return 0
    disk = node.spec.disks.get(DISK)
    return node.status.disks[DISK].available - (disk.reserved if disk is not None else 0)


def page(names: Sequence[str], token: str, most: int) -> tuple[list[str], str]:
    """Of sorted names those after `token`, at most `most` (0: all), and the token of what follows.

    A volume that a token names may be gone by then; the list goes on behind it. Raises AbortedError for a token that
    was never given, InvalidArgumentError.
    """
    if most < 0:
        raise InvalidArgumentError("max_entries is negative")
    after = _read_token(token)
    rest = [name for name in names if name > after]
    if not most or len(rest) <= most:
        return rest, ""
    return rest[:most], _make_token(rest[most - 1])


def _make_token(name: str) -> str:
    return f"{name}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _read_token(token: str) -> str:
    name = token.partition(".")[0]
    if token and (not is_volume_id(name) or _make_token(name) != token):
        raise AbortedError("starting_token is none that this driver gave: begin with an empty one")
    return name


def changed_context(found: Mapping[str, str], given: Mapping[str, str]) -> str:
    """In what a volume_context is not the volume's, or nothing. Sidecars add keys of their own."""
    return next((key for key in given if "/" not in key and given[key] != found.get(key)), "")
