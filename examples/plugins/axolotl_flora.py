"""FLoRA as an adapter of axolotl.

In its YAML: `plugins: [axolotl_flora.FloraPlugin]`, `adapter: flora`, `lora_r: 16`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model

import flora


class FloraPlugin(BasePlugin):
    """Attaches or loads FLoRA where the config says `adapter: flora`."""

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The word that `adapter` takes."""
        return [AdapterCapabilities(name="flora", lora_like=True)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The adapted model and its config; None leaves other adapters to axolotl."""
        if cfg.adapter != "flora":
            return None

        config = flora.FloraConfig(r=cfg.lora_r or 8, target_modules="all-linear", task_type="CAUSAL_LM")
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config

        return get_peft_model(model, config), config
