"""What every object of the Kubernetes API has around its own content."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
"""RFC 3339, in UTC. For people: nothing is decided by comparing it with another machine's clock."""


def json_name(name: str) -> str:
    """How the API writes a field: camel case, with IP in capitals."""
    first, *rest = name.split("_")
    return first + "".join("IP" if word == "ip" else word.capitalize() for word in rest)


class Model(msgspec.Struct, frozen=True, kw_only=True, rename=json_name, omit_defaults=True):
    """Part of an object. What a newer release, or Kubernetes, has beside our fields is not in it."""


class OwnerReference(Model, frozen=True, kw_only=True):
    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool = False
    block_owner_deletion: bool = False


class ObjectMeta(Model, frozen=True, kw_only=True):
    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: int | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


class Condition(Model, frozen=True, kw_only=True):
    """One thing that is so, is not so, or is not known, in words that tell an operator what to do."""

    type: Annotated[
        str, Meta(description="What it is about, in CamelCase.", min_length=1, max_length=63, pattern="^[A-Za-z]+$")
    ]
    status: Annotated[Literal["True", "False", "Unknown"], Meta(description="Whether it is so.")]
    reason: Annotated[str, Meta(description="One word in CamelCase for programs.", max_length=1024)] = ""
    message: Annotated[str, Meta(description="For people: what is the matter, and what to do.", max_length=32768)] = ""
    last_transition_time: Annotated[Time, Meta(description="When status changed last.")] = ""
    observed_generation: Annotated[int, Meta(description="Generation of the spec that this is about.", ge=0)] = 0


class Object(Model, frozen=True, kw_only=True):
    """Any object. A subclass says where the API has it, in `GROUP_VERSION` ("v1" for the core group) and `PLURAL`."""

    GROUP_VERSION: ClassVar[str]
    PLURAL: ClassVar[str]
    NAMESPACED: ClassVar[bool] = True

    metadata: ObjectMeta

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def key(self) -> str:
        """Unique among the objects of its kind."""
        return f"{self.metadata.namespace}/{self.metadata.name}" if self.metadata.namespace else self.metadata.name

    @property
    def deleting(self) -> bool:
        return self.metadata.deletion_timestamp is not None

    def reference(self, *, controller: bool = False) -> OwnerReference:
        """For those that are to go when it is gone. `controller`: as the one that manages them."""
        return OwnerReference(
            api_version=self.GROUP_VERSION,
            kind=type(self).__name__,
            name=self.metadata.name,
            uid=self.metadata.uid,
            controller=controller,
            block_owner_deletion=controller,
        )
