"""A 3-D U-Net of MONAI: its Conv3d and ConvTranspose3d adapted, then a volume predicted by a sliding window."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.inferers.utils import sliding_window_inference
from monai.losses.dice import DiceCELoss
from monai.metrics.meandice import compute_dice
from monai.networks.nets.unet import UNet
from peft import get_peft_model
from torch import Tensor, nn

import flora


def balls(count: int, size: int, contrast: float) -> tuple[Tensor, Tensor]:
    """Noisy volumes (count, 1, size, size, size) with a ball each, and where it is."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")).float()
    centres = torch.randint(size // 4, 3 * size // 4, (count, 3, 1, 1, 1)).float()
    inside = ((grid - centres).square().sum(1, keepdim=True).sqrt() < size / 5).long()
    return contrast * inside + 0.3 * torch.randn(inside.shape), inside


def train(model: nn.Module, contrast: float, steps: int, rate: float) -> None:
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    model.train()
    for _ in range(steps):
        volumes, labels = balls(2, 16, contrast)
        loss(model(volumes), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def dice(model: nn.Module) -> float:
    volumes, labels = balls(3, 24, contrast=-1.0)
    found = sliding_window_inference(volumes, (16, 16, 16), 2, model).argmax(1, keepdim=True)
    return float(compute_dice(found, labels, num_classes=2, include_background=False).nanmean())


def main(output: Path = Path("monai-adapter"), steps: int = 150) -> dict[str, float]:
    torch.manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    train(network, contrast=1.0, steps=steps, rate=3e-3)
    found = {"bright balls only": dice(network)}

    model = get_peft_model(network, flora.FloraConfig(r=8, kernel_r=2, target_modules="all"))
    model.print_trainable_parameters()
    train(model, contrast=-1.0, steps=steps, rate=1e-2)  # now the balls are dark
    found["adapted to dark balls"] = dice(model)
    model.save_pretrained(output)
    return found


if __name__ == "__main__":
    print(main())
