"""What can be compiled, whatever it came from."""

from __future__ import annotations

import torch

from tncompile.frontend.importer import TracedModel
from tncompile.frontend.onnx.importer import OnnxModel

LoadedModel = torch.export.ExportedProgram | OnnxModel
"""What a model file holds."""

ImportedModel = TracedModel | OnnxModel
"""A model with the program imported from it, and what it is checked against and lowered from."""
