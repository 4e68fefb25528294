"""What is told of an object, in words that tell an operator what to do."""

from __future__ import annotations

from typing import Literal

from share_manager.kube.meta import Condition

Status = Literal["True", "False", "Unknown"]


def find(conditions: tuple[Condition, ...], type_: str) -> Condition | None:
    return next((one for one in conditions if one.type == type_), None)


def told(
    conditions: tuple[Condition, ...],
    type_: str,
    status: Status,
    reason: str,
    message: str,
    *,
    now: str,
    generation: int = 0,
) -> tuple[Condition, ...]:
    """`conditions` with this one. The time of its last transition changes with its status only."""
    before = find(conditions, type_)
    since = before.last_transition_time if before is not None and before.status == status else now
    new = Condition(
        type=type_,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=since,
        observed_generation=generation,
    )
    if before is None:
        return (*conditions, new)
    return tuple(new if one.type == type_ else one for one in conditions)
