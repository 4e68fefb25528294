"""Whether replicas hold the same snapshots, and what to do where they do not. Pure.

A snapshot is known by its name and the time of its making, which the engine gives to all replicas alike. Every
acknowledged snapshot that nobody deleted is on every member of the recorded set (see docs/membership.md), so members
can differ only by the one change that a crash of the engine cut short:

* a snapshot that was being made: it is the newest, some have it and others never heard of it;
* a snapshot that was being removed: some have it marked, others not yet.

Neither was acknowledged. Both end the same way: it is marked as removed wherever it is. Its image stays below the head
there and is merged away in time; what a read returns does not change. Images that are marked as removed say nothing:
each replica merges them away at its own pace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from engine.wire.messages import SnapshotEntry

Listing = Sequence[SnapshotEntry]
Key = tuple[str, str]

DIFFERS = "its snapshots differ"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`remove`: what each replica must mark as removed. `leave`: members that differ in a way no crash explains."""

    remove: dict[str, tuple[str, ...]]
    leave: tuple[str, ...] = ()


def key(entry: SnapshotEntry) -> Key:
    return entry.name, entry.created


def kept(listing: Listing) -> dict[Key, SnapshotEntry]:
    """What is not marked as removed, in the order of the listing: the live ones first, the oldest first."""
    return {key(entry): entry for entry in listing if not entry.removed}


def shape(listing: Listing) -> tuple[tuple[Key, ...], frozenset[Key]]:
    """What two replicas must have in common: the chain below the head, and what a revert left aside."""
    found = kept(listing)
    live = tuple(name for name, entry in found.items() if entry.live)
    return live, frozenset(found) - frozenset(live)


def newest(listing: Listing) -> Key | None:
    live = shape(listing)[0]
    return live[-1] if live else None


def reconcile(members: Mapping[str, Listing]) -> Verdict:
    """What makes members equal again that a crash of the engine left different."""
    keys = {name: set(kept(listing)) for name, listing in members.items()}
    common = set.intersection(*keys.values()) if keys else set()
    removed = {key(entry) for listing in members.values() for entry in listing if entry.removed}
    remove: dict[str, list[str]] = {}
    for name, listing in members.items():
        for one in keys[name] - common:
            if one in removed or one == newest(listing):
                remove.setdefault(name, []).append(one[0])
    shapes = {name: shape(_without(listing, remove.get(name, ()))) for name, listing in members.items()}
    leave: tuple[str, ...] = ()
    if len(set(shapes.values())) > 1:
        # the first of those that have most
        reference = max(shapes.values(), key=lambda one: len(one[0]) + len(one[1]))
        leave = tuple(name for name, one in shapes.items() if one != reference)
    return Verdict(remove={name: tuple(sorted(names)) for name, names in remove.items()}, leave=leave)


def returning(member: Listing, absent: Listing) -> tuple[str, ...] | None:
    """What a replica that was away must mark as removed, so that copying what changed makes it equal to a member.

    None when it lacks a snapshot, or its chain took another path: then only a copy of everything helps.
    """
    wanted = kept(member)
    extra = tuple(name for name, created in kept(absent) if (name, created) not in wanted)
    return extra if shape(_without(absent, extra)) == shape(member) else None


def _without(listing: Listing, names: Sequence[str]) -> Listing:
    return [entry for entry in listing if entry.name not in names]


def mergeable(listing: Listing) -> list[str]:
    """Removed snapshots that can be merged away now: the head does not build on them, at most one snapshot does, and
    no clone shares their data."""
    live = [entry for entry in listing if entry.live]
    below_head = live[-1].name if live else ""
    return [
        entry.name
        for entry in listing
        if entry.removed and entry.name != below_head and entry.children <= 1 and not entry.pinned
    ]


def merge_cost(listing: Listing) -> int:
    """About how many bytes merging away all that is removed copies: what their children hold."""
    removed = {entry.name for entry in listing if entry.removed}
    return sum(entry.allocated for entry in listing if entry.parent in removed)
