"""Lightning: the module holds an adapted model; a callback-free way to save the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import flora


class Adapted(lightning.LightningModule):
    def __init__(self, base: nn.Module, config: flora.FloraConfig, rate: float) -> None:
        super().__init__()
        self.model = get_peft_model(base, config)
        self.rate = rate

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out of Lightning's checkpoints."""
        trained = {name for name, value in self.named_parameters() if value.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}


def main(output: Path = Path("lightning-adapter"), epochs: int = 3) -> Path:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    data = TensorDataset(torch.randn(64, 3, 12, 12), torch.randint(4, (64,)))
    module = Adapted(base, flora.FloraConfig(r=4, target_modules="all-conv", modules_to_save=["4"]), rate=1e-2)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", default_root_dir=output, logger=False, enable_progress_bar=False,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    module.model.save_pretrained(output)
    return output


if __name__ == "__main__":
    print(main())
