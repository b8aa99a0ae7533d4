"""The structures of inputs and outputs in a file of torch.export, without the classes that they are of.

torch has the name of each class in the file, and imports none: it reads the file only where they are registered with it
already, as those of transformers are once that is imported. The names of fields are in the file as well; so a class
that torch does not know becomes a dict of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

from tncompile.frontend.structure import keys_in

_NAMEDTUPLE = "collections.namedtuple"


def without_classes(graph_module: dict[str, Any]) -> None:
    """Rewrite, in the JSON of a program's ``graph_module``, what torch could not read."""
    tuples = graph_module.get("treespec_namedtuple_fields") or {}
    fields = {name: list(found["field_names"]) for name, found in tuples.items()}
    for entry in graph_module["module_call_graph"]:
        signature = entry.get("signature") or {}
        for key in ("in_spec", "out_spec"):
            if signature.get(key):
                protocol, spec = json.loads(signature[key])
                signature[key] = json.dumps([protocol, _known(spec, fields)])


def _known(spec: dict[str, Any], fields: Mapping[str, list[str]]) -> dict[str, Any]:
    """A structure in which torch knows every class; dicts, and tuples, for those that it does not."""
    if spec["type"] is None:
        return spec
    children = [_known(child, fields) for child in spec["children_spec"]]
    name = spec["context"] if spec["type"] == _NAMEDTUPLE else spec["type"]
    if name in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return {**spec, "children_spec": children}
    keys = keys_in(fields.get(name) if spec["type"] == _NAMEDTUPLE else _context(spec["context"]), len(children))
    plain = ("builtins.dict", json.dumps(keys)) if keys else ("builtins.tuple", "null")
    return {"type": plain[0], "context": plain[1], "children_spec": children}


def _context(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):  # a class may write it as it likes
        return None
