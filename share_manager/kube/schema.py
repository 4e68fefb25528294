"""Structural schemas of the custom resource definitions, made of the types in `resources`.

A structural schema says everything at the place itself: no references, no alternatives of types
(https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema).
"""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
from msgspec import inspect as types

from share_manager.kube.meta import Condition
from share_manager.kube.resources import GROUP, VERSION, Resource

Json = dict[str, Any]


def definition(kind: type[Resource]) -> Json:
    """The CustomResourceDefinition of a kind."""
    singular = kind.__name__.lower()
    names = {
        "kind": kind.__name__,
        "listKind": f"{kind.__name__}List",
        "plural": kind.PLURAL,
        "singular": singular,
        "shortNames": list(kind.SHORT_NAMES),
        "categories": ["share-manager"],
    }
    version: Json = {"name": VERSION, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema(kind)}}
    if "status" in kind.__struct_fields__:
        version["subresources"] = {"status": {}}
    version["additionalPrinterColumns"] = [
        {"name": name, "type": of, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, of, path, priority in kind.COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def schema(kind: type[Resource]) -> Json:
    """Of whole objects. Metadata is the API server's own."""
    properties: Json = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
    }
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    for field in info.fields:
        if field.encode_name != "metadata":
            part = _of(field.type) | {"description": "What is wanted." if field.encode_name == "spec" else "What is."}
            if not field.required:
                part["default"] = {}
            properties[field.encode_name] = part
    required = ["spec"] if any(field.encode_name == "spec" and field.required for field in info.fields) else []
    whole: Json = {"type": "object", "description": _words(kind), "properties": properties}
    return whole | ({"required": required} if required else {})


def _words(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").replace("`", "").split())


def _of(found: types.Type) -> Json:
    if isinstance(found, types.Metadata):
        extra = found.extra_json_schema or {}
        return _of(found.type) | extra
    if isinstance(found, types.UnionType):
        # what may be missing is left out, never null
        (only,) = [one for one in found.types if not isinstance(one, types.NoneType)]
        return _of(only)
    if isinstance(found, types.StrType):
        return _given({"type": "string"}, pattern=found.pattern, minLength=found.min_length, maxLength=found.max_length)
    if isinstance(found, types.BoolType):
        return {"type": "boolean"}
    if isinstance(found, types.IntType):
        return _given(
            {"type": "integer", "format": "int64"}, minimum=found.ge, maximum=found.le, multipleOf=found.multiple_of
        )
    if isinstance(found, types.FloatType):
        return _given({"type": "number"}, minimum=found.ge, maximum=found.le)
    if isinstance(found, types.LiteralType):
        of = {"type": "integer", "format": "int64"} if isinstance(found.values[0], int) else {"type": "string"}
        return of | {"enum": list(found.values)}
    if isinstance(found, types.VarTupleType):
        items = _of(found.item_type)
        return _given({"type": "array", "items": items}, minItems=found.min_length, maxItems=found.max_length) | (
            {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
            if isinstance(found.item_type, types.StructType) and found.item_type.cls is Condition
            else {"x-kubernetes-list-type": "atomic"}
        )
    if isinstance(found, types.DictType):
        return {"type": "object", "additionalProperties": _of(found.value_type)}
    if isinstance(found, types.StructType):
        return _struct(found)
    raise TypeError(f"no schema for {found}")


def _struct(found: types.StructType) -> Json:
    properties = {}
    for field in found.fields:
        part = _described(field.type)
        part |= _of(field.type)
        if field.default not in (None, "", (), msgspec.NODEFAULT):
            # as what is encoded leaves defaults out
            part["default"] = msgspec.to_builtins(field.default)
        properties[field.encode_name] = part
    required = [field.encode_name for field in found.fields if field.required]
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})


def _described(found: types.Type) -> Json:
    """First in its place, where people look."""
    extra = _extra(found)
    return {"description": extra["description"]} if "description" in extra else {}


def _extra(found: types.Type) -> Json:
    return (found.extra_json_schema or {}) if isinstance(found, types.Metadata) else {}


def _given(start: Json, **bounds: Any) -> Json:
    return start | {name: bound for name, bound in bounds.items() if bound is not None}
