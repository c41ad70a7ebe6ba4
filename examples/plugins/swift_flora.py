"""FLoRA as a tuner of ms-swift.

`swift sft --external_plugins swift_flora.py --tuner_type flora --lora_rank 16 --model ... --dataset ...`
"""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

import flora


class FloraTuner(PeftTuner):
    """Attaches FLoRA with the rank that `--lora_rank` gives; saving and loading are those of PEFT."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """The model with a fresh adapter on all linear layers."""
        config = flora.FloraConfig(r=args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)


tuners_map["flora"] = FloraTuner
