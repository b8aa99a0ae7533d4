"""The module that `tncompile.to_torch` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tncompile.emit.module.graph import Emitted, as_tensor
from tncompile.errors import TNCompileError
from tncompile.frontend.training import TrainedModel


class TrainableModule(torch.nn.Module):
    """A model computed along planned orders, forward and backward. What it takes and returns is as in the original.

    Parameters and buffers have the original's names, so that a state_dict of one can be loaded into the other. In
    training mode it computes what the original does in training mode, in evaluation mode what it does there, where both
    were traced.
    """

    def __init__(self, modes: Mapping[bool, tuple[TrainedModel, Emitted]], state: torch.nn.Module) -> None:
        super().__init__()
        for name, child in state.named_children():
            self.add_module(name, child)
        for name, parameter in state.named_parameters(recurse=False, remove_duplicate=False):
            self.register_parameter(name, parameter)
        for name, buffer in state.named_buffers(recurse=False, remove_duplicate=False):
            self.register_buffer(name, buffer, name not in state._non_persistent_buffers_set)
        self._modes = torch.nn.ModuleDict(
            {_MODE[training]: _Mode(model, emitted) for training, (model, emitted) in modes.items()}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's `forward` takes and returns."""
        name = _MODE[self.training]
        mode = self._modes[name if name in self._modes else _MODE[not self.training]]
        assert isinstance(mode, _Mode)
        leaves = mode.leaves(args, kwargs)
        state = [None if isinstance(source, int) else self._get(source) for source in mode.sources]
        return mode.given(state, leaves)

    def load_from(self, module: torch.nn.Module) -> None:
        """Take over the parameters and buffers of the original, or of a module that has the same.

        TNCompileError where names or shapes differ.
        """
        _load(self, module)

    def store_into(self, module: torch.nn.Module) -> None:
        """Give the original, or a module of the same parameters and buffers, those of this one.

        TNCompileError where names or shapes differ.
        """
        _load(module, self)

    def _get(self, path: Sequence[str]) -> torch.Tensor:
        found: Any = self
        for name in path:
            found = getattr(found, name)
        assert isinstance(found, torch.Tensor)
        return found


_MODE = {True: "in_training", False: "in_evaluation"}


class _Mode(torch.nn.Module):
    """What the model computes in one mode, given its state and the leaves of what the user gives."""

    def __init__(self, model: TrainedModel, emitted: Emitted) -> None:
        super().__init__()
        self.graph = emitted.module
        self.sources = tuple(
            tuple(model.state[name].split(".")) if name in model.state else model.arguments.index(name)
            for name in emitted.inputs
        )
        self.constants = len(emitted.constants)
        for number, array in enumerate(emitted.constants):
            self.register_buffer(f"constant_{number}", as_tensor(array), persistent=False)
        spec = model.exported.call_spec
        self.takes, self.returns = spec.in_spec, spec.out_spec

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What is given, leaf by leaf as it was when the model was traced. TNCompileError where it is otherwise."""
        known = self.takes.child(1).context
        if kwargs and list(kwargs) != known and {*kwargs} == {*known}:
            kwargs = {name: kwargs[name] for name in known}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.takes:
            positional = self.takes.child(0).num_children
            named = f" and {', '.join(known)} by name" if known else ""
            raise TNCompileError(
                f"the inputs are not given as when the model was traced: {positional} in order{named}, each built alike"
            )
        return leaves

    def given(self, state: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """What the model returns, from its state (as `sources` has it) and the leaves of its inputs."""
        values = [leaves[s] if isinstance(s, int) else have for s, have in zip(self.sources, state, strict=True)]
        constants = [getattr(self, f"constant_{k}") for k in range(self.constants)]
        return pytree.tree_unflatten(self.graph(*values, *constants), self.returns)


def state_of(exported: torch.export.ExportedProgram) -> torch.nn.Module:
    """Copies of all parameters and buffers of an exported program, by their names; what is tied stays tied."""
    signature = exported.graph_signature
    root = torch.nn.Module()
    copies: dict[Any, torch.Tensor] = {}
    tensors = dict(exported.state_dict)
    tensors |= {name: exported.constants[name] for name in signature.non_persistent_buffers}
    for key, tensor in tensors.items():
        *path, name = key.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else key
        copy = copies.get(identity)
        if copy is None:
            copy = tensor.detach().clone()
            if key in signature.parameters or isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, tensor.requires_grad)
            copies[identity] = copy
        if isinstance(copy, torch.nn.Parameter):
            owner.register_parameter(name, copy)
        else:
            owner.register_buffer(name, copy, persistent=key not in signature.non_persistent_buffers)
    return root


def _load(target: torch.nn.Module, source: torch.nn.Module) -> None:
    try:
        target.load_state_dict(source.state_dict())
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise TNCompileError(f"the modules do not have the same parameters: {lines[0]}") from error
