"""Tensor networks by the libraries that are made for them, and structured layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from benchmarks.models import Loaded
from benchmarks.models.inputs import digits
from benchmarks.models.packages import stand_in, torchvision, without_init


def tensorkrowch_mps() -> Loaded:
    """A matrix product state over 64 pixels and one output site, bond 8, by TensorKrowch."""
    import tensorkrowch as tk

    state = tk.models.MPSLayer(
        n_features=65, in_dim=2, out_dim=10, bond_dim=8, boundary="obc", init_method="randn_eye", std=1e-3
    )

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = state

        def forward(self, x: torch.Tensor) -> Any:
            return self.state(tk.embeddings.poly(x, degree=1), inline_input=False, inline_mats=False)

    model = Classifier()
    state.auto_stack, state.auto_unbind = True, False
    state.trace(torch.zeros(1, 64, 2))  # TensorKrowch's own tracing: it fixes how sites are stacked
    return Loaded(model, (digits(8).flatten(1),))


def quimb_mps() -> Loaded:
    """A matrix product state over 64 pixels, bond 6, contracted with a product state of each image by quimb."""
    import quimb.tensor as qtn

    sites = 64
    state = qtn.MPS_rand_state(sites, bond_dim=6, phys_dim=2, seed=1)
    # amplitudes that neither vanish nor overflow over so many sites
    state.apply_to_arrays(lambda array: torch.tensor(array, dtype=torch.float32) * 1.45)
    arrays, skeleton = qtn.pack(state)

    class Amplitude(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.arrays = nn.ParameterDict({str(key): nn.Parameter(array) for key, array in arrays.items()})

        def forward(self, x: torch.Tensor) -> Any:
            network = qtn.unpack({int(key): array for key, array in self.arrays.items()}, skeleton)
            angle = x * (math.pi / 2)
            pixels = torch.stack([angle.cos(), angle.sin()], -1)
            product = [qtn.Tensor(pixels[:, site], inds=("image", f"k{site}")) for site in range(sites)]
            whole = network | qtn.TensorNetwork(product)
            return whole.contract(output_inds=("image",), optimize="greedy").data

    return Loaded(Amplitude(), (digits(8).flatten(1),))


def einconv_lenet() -> Loaded:
    """A LeNet whose two convolutions are einsums over index patterns, by einconv."""
    from einconv.modules import ConvNd

    first, second = ConvNd(2, 1, 6, 5, padding=2), ConvNd(2, 6, 16, 5)
    features = [first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return Loaded(nn.Sequential(*features, nn.Linear(400, 84), nn.ReLU(), nn.Linear(84, 10)), (digits(4, 28),))


def monarch_mlp() -> Loaded:
    """784 -> 1024 -> 1024 -> 10 of Monarch matrices in four blocks, by torch-structured."""
    without_init("torch_structured")  # that would import triton
    from torch_structured.monarch.monarch_linear import MonarchLinear

    first, second = MonarchLinear(784, 1024, nblocks=4), MonarchLinear(1024, 1024, nblocks=4)
    model = nn.Sequential(nn.Flatten(), first, nn.GELU(), second, nn.GELU(), nn.Linear(1024, 10))
    return Loaded(model, (digits(8, 28),))


def fourier_operator() -> Loaded:
    """A Fourier neural operator of two layers on fields of 64×64, its spectral weights in Tucker form, by neuralop."""
    torchvision()  # torchmetrics, which it imports, imports it where it is installed
    stand_in("requests", "wandb", "h5py", "zarr", "ruamel.yaml", "configmypy", "torch_harmonics")
    from neuralop.models import TFNO

    model = TFNO(
        n_modes=(16, 16),
        in_channels=1,
        out_channels=1,
        hidden_channels=32,
        n_layers=2,
        factorization="tucker",
        implementation="factorized",
        rank=0.1,
    )
    return Loaded(model, (torch.randn(2, 1, 64, 64),))
