"""Small models that the conversions are tried on, also by processes that must not import flora: nothing here does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)


class Mixed(nn.Module):
    """An embedding, a convolution of each dimension and a linear layer, in awkward sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 7)
        self.line = nn.Conv1d(7, 11, 3, padding=1)
        self.plane = nn.Sequential(nn.Conv2d(1, 5, (3, 2)), nn.Tanh(), nn.Conv2d(5, 13, (2, 5), stride=2))
        self.space = nn.Conv3d(1, 3, (2, 3, 1))
        self.head = nn.Linear(3, 17)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line(self.embed(ids).mT)  # (batch, 11, length)
        x = self.plane(x.unsqueeze(1))
        x = self.space(x.unsqueeze(1))
        return self.head(torch.tanh(x).flatten(2).mean(2))


def gpt2() -> nn.Module:
    """GPT-2, whose linear layers are stored transposed."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=41,
            n_positions=16,
            n_embd=12,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )


def mixtral() -> nn.Module:
    """A mixture of experts, fused into 3-D parameters, two of them in one module."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=37,
            hidden_size=24,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )


def resnet() -> nn.Module:
    """A residual network of convolutions, strided and 1x1 ones among them."""
    config = ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[12, 20],
        depths=[1, 2],
        layer_type="basic",
    )
    return ResNetForImageClassification(config)


def volumes() -> nn.Module:
    """A network of 3-D convolutions, as for video."""
    return nn.Sequential(
        nn.Conv3d(2, 7, (3, 5, 5)),
        nn.ReLU(),
        nn.Conv3d(7, 11, (3, 3, 2)),
        nn.ReLU(),
        nn.Conv3d(11, 13, 3),
        nn.Flatten(),
        nn.Linear(13, 5),
    )


BUILDERS = {"mixed": Mixed, "gpt2": gpt2, "mixtral": mixtral, "resnet": resnet, "volumes": volumes}


def build(name: str) -> nn.Module:
    """The model of that name, with the same random weights every time, in eval mode."""
    torch.manual_seed(1)
    return BUILDERS[name]().eval()


def inputs(name: str) -> Tensor:
    """Token ids for the model of that name."""
    return torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module, name: str) -> Tensor:
    """What the model answers."""
    with torch.no_grad():
        out = model(inputs(name))
    return out if isinstance(out, Tensor) else out.logits
