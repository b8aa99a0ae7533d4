"""Views of a program: text, JSON, Graphviz, networkx. Pure functions; they store nothing."""

from tncompile.inspect.dot import to_dot
from tncompile.inspect.graph import networkx_json, to_networkx
from tncompile.inspect.record import to_json
from tncompile.ir.text import dump as to_text

__all__ = ["networkx_json", "to_dot", "to_json", "to_networkx", "to_text"]
