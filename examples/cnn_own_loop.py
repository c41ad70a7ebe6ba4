"""A convolutional network with batch norms: trained on digits, adapted to inverted ones in a loop of your own."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flora


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    model.train()  # the batch norms of an adapted model keep the base model's statistics, here too
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def main(output: Path = Path("cnn-adapter"), epochs: int = 10) -> dict[str, float]:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)
    base = network()
    train(base, images[:900], labels[:900], epochs, 3e-3)
    weights = {name: value.clone() for name, value in base.state_dict().items()}

    inverted, test = (-images[900:1000], labels[900:1000]), (-images[1000:], labels[1000:])
    found = {"base": accuracy(base, *test)}
    model = get_peft_model(base, flora.FloraConfig(r=8, target_modules="all", modules_to_save=["8"]))
    model.print_trainable_parameters()
    train(model, *inverted, 4 * epochs, 1e-2)
    found["adapted"] = accuracy(model, *test)
    model.save_pretrained(output)

    again = network()
    again.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(again, output).eval()
    found["loaded"] = accuracy(loaded, *test)
    found["merged"] = accuracy(loaded.merge_and_unload(), *test)
    return found


if __name__ == "__main__":
    print(main())
