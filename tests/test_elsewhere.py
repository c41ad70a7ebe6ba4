"""What other libraries would do wrong with an adapter of ours is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import peft.optimizers
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn

import flora
from flora.errors import UserError

UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
    "attention_head_dim": 4, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
OPTIMIZERS = {
    "create_loraplus_optimizer": {"optimizer_cls": torch.optim.AdamW, "lr": 1e-3, "loraplus_lr_ratio": 16.0},
    "create_lorafa_optimizer": {"r": 2, "lora_alpha": 4, "lr": 1e-3},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_for_lora_refuse_our_adapters_and_take_loras(name: str) -> None:
    # Bound before an adapter of ours is there, as an import at the top of a script does.
    create = getattr(peft.optimizers, name)
    ours = get_peft_model(nn.Sequential(nn.Linear(5, 7)), flora.FloraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UserError, match=f"{name} knows LoRA's matrices"):
        create(ours, **OPTIMIZERS[name])
    loras = get_peft_model(nn.Sequential(nn.Linear(5, 7)), LoraConfig(r=2, target_modules=["0"]))
    assert create(loras, **OPTIMIZERS[name]).param_groups


def test_saving_as_lora_is_refused_where_nothing_could_load_it(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**UNET)
    unet.add_adapter(flora.FloraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(UserError, match="flora convert FOLDER --to kohya"):
        unet.save_lora_adapter(tmp_path / "out", "style")
    with pytest.raises(UserError, match="flora convert FOLDER --to kohya"):
        copy.deepcopy(unet).save_lora_adapter(tmp_path / "out", adapter_name="style")
    assert not (tmp_path / "out").exists()


def test_loras_are_saved_as_before(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**UNET)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.save_lora_adapter(tmp_path / "lora")
    assert any((tmp_path / "lora").iterdir())
