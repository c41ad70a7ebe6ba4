"""Small adapters in ``tests/saved`` with the outputs and weights they gave when they were written.

Written once by version 0.1.0; do not regenerate: it is what users have on disk. ``tests/test_saved_adapters.py`` loads
them with the code of today. To add a case, give it a row below and run ``python tests/saved_adapters.py``, which writes
what is missing and leaves what is there alone.

A case's base model and inputs are made of integer arithmetic on names, so that they are the same with any version of
torch. Its folder holds what ``save_pretrained`` wrote and ``expected.safetensors``: each tensor of the output in eval
mode (``output.0`` ...), and each weight that merging changed (``merged.<name>``). Only flora's public names are used.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import flora

FOLDER = Path(__file__).parent / "saved"
EXPECTED = "expected.safetensors"
BOTH = "both.safetensors"  # of a case with two adapters: what they give together
SECOND = "second"  # the name of the second adapter, and of its folder inside the first one's


# ---- numbers that depend on nothing but a name -----------------------------------------------------------------------


def _hash(key: str, shape: tuple[int, ...]) -> Tensor:
    """Integers in [0, 2**32), as int64: a mixing function of the index and the key."""
    mixed = torch.arange(torch.Size(shape).numel()) + zlib.crc32(key.encode())
    for _ in range(3):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)).reshape(shape)


def numbers(key: str, *shape: int) -> Tensor:
    """Float64 in [-1, 1)."""
    return _hash(key, shape).double() / 2**31 - 1


def fill(model: nn.Module) -> None:
    """Gives every parameter and statistic its numbers, by its name."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(numbers(name, *value.shape) / 2)
        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(numbers(name, *value.shape) / 2)
            elif name.endswith("running_var"):
                value.copy_(numbers(name, *value.shape).abs() + 0.5)


def perturb(model: nn.Module, key: str) -> None:
    """Adds to everything that the adapter trains, so that no part of it is zero or as it was initialised."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_((numbers(f"{key} {name}", *value.shape) / 2).to(value.dtype))


# ---- models ----------------------------------------------------------------------------------------------------------


class One(nn.Module):
    """One layer under the name ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


class Net(nn.Module):
    """Layers of several kinds, some of them in a list, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(3))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(self.conv(x).tanh())).tanh().mean((2, 3))
        for block in self.blocks:
            out = out + block["down"](block["up"](out).tanh())
        return self.head(out)


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).tanh())


class Experts(nn.Module):
    """Fused experts as transformers stores them, (E, out, in) then (E, in, out), run expert by expert."""

    def __init__(self, inner: int = 7) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(5, inner, 11))
        self.down = nn.Parameter(torch.empty(5, inner, 11))

    def forward(self, hidden: Tensor, expert: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for index in range(self.up.shape[0]):
            rows = torch.where(expert == index)[0]
            middle = nn.functional.linear(hidden[rows], self.up[index]).tanh()
            out = out.index_add(0, rows, middle @ self.down[index])
        return out


class Routed(nn.Module):
    """A linear layer, then experts: targets of both sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(11, 11)
        self.experts = Experts()

    def forward(self, hidden: Tensor, expert: Tensor) -> Tensor:
        return self.experts(self.proj(hidden), expert)


class Volume(nn.Module):
    """A raw parameter of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(3, 5, 7, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(x, self.kernel, dims=([1, 2], [1, 2]))


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv1d(7, 11, 5, padding=2))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=19, n_positions=8, n_embd=6, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=19,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=10,
        max_position_embeddings=8,
        num_labels=3,
    )
    config._attn_implementation = "eager"
    return BertForSequenceClassification(config)


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A case: a base model, what it is called with, and the fields of its ``FloraConfig``.

    Attributes:
        build: makes the model; its weights are then overwritten.
        inputs: what it is called with.
        config: fields of the config; rank 3 on ``layer`` where they say nothing else.
        second: fields of a second adapter on the same model.
        dtype: of the base model; all but a few are float64, so that the comparison is sharp.
        resaved: the folder is that of ``flora.save`` and not of ``save_pretrained``.
        summed: the saved adapter is the weighted sum of the first and the second.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    config: dict[str, Any] = field(default_factory=dict)
    second: dict[str, Any] | None = None
    dtype: torch.dtype = torch.float64
    resaved: bool = False
    summed: bool = False

    def base(self) -> nn.Module:
        """The model before the adapter, in eval mode."""
        model = self.build().double()
        fill(model)
        return model.to(self.dtype).eval().requires_grad_(True)

    def adapters(self, folder: Path) -> Iterator[Path]:
        """The folders of its adapters, where ``folder`` is its own."""
        yield folder
        if self.second is not None and not self.summed:
            yield folder / SECOND

    def run(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the model's output."""
        inputs = [value.to(self.dtype) if value.is_floating_point() else value for value in self.inputs]
        with torch.no_grad():
            return {f"output.{place}": value for place, value in enumerate(tensors_in(model(*inputs)))}


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, nested or not; of transformers' outputs the logits."""
    if isinstance(output, Tensor):
        yield output.contiguous()
    elif hasattr(output, "logits"):
        yield output.logits.contiguous()
    else:
        for part in output:
            yield from tensors_in(part)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the state dict, with the weight itself in place of what a parametrization computes it from."""
    found = {name: value for name, value in model.state_dict().items() if ".parametrizations." not in name}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found.update({f"{name}.{leaf}": getattr(module, leaf).detach() for leaf in module.parametrizations})
    return {name: value.detach().clone() for name, value in found.items()}


def x(*shape: int) -> tuple[Tensor, ...]:
    return (numbers(f"x {shape}", *shape) * 2,)


def ids(high: int, *shape: int) -> tuple[Tensor, ...]:
    return (_hash(f"ids {shape}", shape) % high,)


def sequence(embed: int, kdim: int, vdim: int) -> tuple[Tensor, ...]:
    return (*x(2, 5, embed), *x(2, 3, kdim), *x(2, 3, vdim))


def tokens() -> tuple[Tensor, ...]:
    return (numbers("tokens", 13, 11), torch.arange(13) % 5)


IMAGES = x(2, 3, 5, 4)
EXPERTS = {"target_modules": None, "target_parameters": ["layer.up", "layer.down"], "r": [3, 4, 5]}
NET = {"target_modules": "all", "exclude_modules": ["head"]}


def linear() -> nn.Module:
    return One(nn.Linear(13, 7))


def conv2d() -> nn.Module:
    return One(nn.Conv2d(7, 11, (3, 5), stride=(2, 3), padding=(1, 2)))


def lone(layer: Callable[[], nn.Module], inputs: tuple[Tensor, ...], **config: Any) -> Saved:
    return Saved(lambda: One(layer()), inputs, config)


LAYERS: dict[str, Saved] = {
    "linear": lone(lambda: nn.Linear(13, 7), x(3, 5, 13), r=[2, 3]),
    "linear_without_bias": lone(lambda: nn.Linear(11, 17, bias=False), x(5, 11)),
    "linear_whole_output": lone(lambda: nn.Linear(13, 5), x(3, 13), r=[5, 3]),
    "linear_whole_input": lone(lambda: nn.Linear(3, 13), x(5, 3), r=[2, 3]),
    "gpt2_conv1d": lone(lambda: Conv1D(17, 11), x(3, 5, 11), r=[2, 3]),
    "conv1d": lone(lambda: nn.Conv1d(7, 11, 5, stride=2, padding=3, dilation=2), x(2, 7, 17), r=[3, 2, 4]),
    "conv1d_circular": lone(lambda: nn.Conv1d(7, 11, 5, padding=2, padding_mode="circular"), x(2, 7, 9)),
    "conv1d_weight_norm": lone(weight_normed, x(2, 7, 9)),
    "conv1d_groups": lone(lambda: nn.Conv1d(6, 9, 3, groups=3), x(2, 6, 7), r=[4, 2, 2]),
    "conv2d": Saved(conv2d, x(2, 7, 7, 9), {"r": [5, 3, 2, 4]}),
    "conv2d_dilated": lone(lambda: nn.Conv2d(5, 7, (3, 5), padding="same", dilation=2), x(2, 5, 7, 5), r=[3, 2, 3, 2]),
    "conv2d_groups": lone(lambda: nn.Conv2d(15, 21, 3, groups=3, padding=1), x(2, 15, 5, 3), r=[4, 3, 2, 2]),
    "conv2d_depthwise": lone(lambda: nn.Conv2d(13, 13, 7, groups=13, padding=3), x(2, 13, 5, 3), r=[5, 1, 2, 3]),
    "conv2d_multiplier": lone(lambda: nn.Conv2d(5, 15, (3, 2), groups=5), x(2, 5, 5, 4), r=[4, 1, 2, 2]),
    "conv2d_1x1": lone(lambda: nn.Conv2d(11, 7, 1, stride=2), x(2, 11, 5, 3)),
    "conv3d": lone(lambda: nn.Conv3d(5, 7, (1, 3, 2), stride=(1, 2, 1)), x(2, 5, 2, 7, 4), r=[3, 2, 1, 2, 2]),
    "conv3d_groups": lone(lambda: nn.Conv3d(6, 10, 3, groups=2, padding=1), x(1, 6, 3, 2, 5), r=[3, 2, 2, 1, 3]),
    "conv3d_depthwise": lone(lambda: nn.Conv3d(5, 5, 3, groups=5, padding=1, dilation=1), x(1, 5, 3, 2, 5)),
    "transposed_conv1d": lone(
        lambda: nn.ConvTranspose1d(7, 11, 5, stride=3, padding=1, output_padding=2, dilation=2), x(2, 7, 5), r=[3, 2, 4]
    ),
    "transposed_conv2d": lone(lambda: nn.ConvTranspose2d(7, 5, (3, 2), stride=2), x(2, 7, 5, 3), r=[3, 2, 2, 1]),
    "transposed_conv2d_groups": lone(
        lambda: nn.ConvTranspose2d(15, 21, 3, groups=3, stride=2, padding=1, output_padding=1),
        x(1, 15, 3, 2),
        r=[4, 3, 2, 2],
    ),
    "transposed_conv3d": lone(lambda: nn.ConvTranspose3d(5, 7, 2, stride=2), x(1, 5, 2, 3, 2), r=[3, 2, 2, 1, 2]),
    "embedding": lone(lambda: nn.Embedding(23, 7), ids(23, 3, 5), r=[5, 3]),
    "embedding_padding": lone(lambda: nn.Embedding(23, 7, padding_idx=2), ids(23, 3, 5), r=[5, 3]),
    "embedding_bag_mean": lone(lambda: nn.EmbeddingBag(23, 7, mode="mean"), ids(23, 3, 5), r=[5, 3]),
    "embedding_bag_max": lone(lambda: nn.EmbeddingBag(23, 7, mode="max"), ids(23, 3, 5), r=[5, 3]),
    "bilinear": lone(lambda: nn.Bilinear(7, 5, 11), (*x(3, 7), *x(3, 5)), r=[3, 2, 4]),
    "attention": lone(lambda: nn.MultiheadAttention(15, 5, batch_first=True), sequence(15, 15, 15)),
    "attention_kdim_vdim": lone(
        lambda: nn.MultiheadAttention(15, 3, kdim=7, vdim=11, batch_first=True), sequence(15, 7, 11)
    ),
    "attention_scale_pattern": lone(
        lambda: nn.MultiheadAttention(10, 2, batch_first=True), sequence(10, 10, 10), scale_pattern={"layer": 0.5}
    ),
    "lstm": lone(lambda: nn.LSTM(5, 7, num_layers=2, batch_first=True), x(2, 3, 5)),
    "lstm_bidirectional_projected": lone(lambda: nn.LSTM(5, 7, bidirectional=True, proj_size=3), x(3, 2, 5), r=2),
    "gru": lone(lambda: nn.GRU(7, 11), x(5, 3, 7)),
    "rnn": lone(lambda: nn.RNN(7, 11), x(5, 3, 7)),
    "lstm_cell": lone(lambda: nn.LSTMCell(7, 11), x(3, 7)),
    "gru_cell": lone(lambda: nn.GRUCell(7, 11), x(3, 7)),
    "rnn_cell": lone(lambda: nn.RNNCell(7, 11), x(3, 7)),
    "layer_norm": lone(lambda: nn.LayerNorm(11), x(3, 11), r=[11]),
    "group_norm": lone(lambda: nn.GroupNorm(3, 15), x(2, 15, 5), r=[15]),
    "rms_norm": lone(lambda: nn.RMSNorm(11, eps=1e-6), x(3, 11), r=[11]),
    "batch_norm1d": lone(lambda: nn.BatchNorm1d(7), x(5, 7, 3), r=[7]),
    "batch_norm2d": lone(lambda: nn.BatchNorm2d(7), x(3, 7, 3, 2), r=[7]),
    "batch_norm3d": lone(lambda: nn.BatchNorm3d(5), x(2, 5, 3, 2, 2), r=[5]),
    "experts": Saved(lambda: One(Experts()), tokens(), EXPERTS),
    "experts_one_parameter": Saved(lambda: One(Experts()), tokens(), {**EXPERTS, "target_parameters": ["layer.down"]}),
    "experts_rebuild": Saved(lambda: One(Experts()), tokens(), {**EXPERTS, "path": "rebuild"}),
    "experts_beside_linear": Saved(
        Routed, tokens(), {"target_modules": ["proj"], "target_parameters": ["experts.up", "experts.down"]}
    ),
    "raw_parameter_4d": Saved(
        lambda: One(Volume()),
        x(3, 5, 7),
        {"target_modules": None, "target_parameters": ["layer.kernel"], "r": [2, 3, 4, 2]},
    ),
}

FEATURES: dict[str, Saved] = {
    "rank_8_by_default": Saved(conv2d, x(2, 7, 7, 9), {"r": 8}),
    "kernel_r_none": Saved(conv2d, x(2, 7, 7, 9), {"kernel_r": None}),
    "kernel_r_1": Saved(conv2d, x(2, 7, 7, 9), {"kernel_r": 1}),
    "fold_of_a_linear": lone(
        lambda: nn.Linear(11, 30), x(3, 11), r=[2, 3, 2, 5], fold={"layer": "(qkv heads dim) in, qkv=3 heads=5"}
    ),
    "fold_by_weight_name": lone(
        lambda: nn.Linear(12, 10), x(3, 12), r=[2, 3, 2, 2], fold={"layer.weight": "(heads dim) (a b), heads=2 a=3"}
    ),
    "fold_of_an_embedding": lone(
        lambda: nn.Embedding(24, 7), ids(24, 3, 5), fold={"layer": "(group word) dim, group=4"}
    ),
    "fold_of_a_conv": lone(
        lambda: nn.Conv2d(6, 10, 3), x(2, 6, 5, 4), r=[2, 3, 3, 2, 2], fold={"layer": "(two out) in kh kw, two=2"}
    ),
    "fold_of_experts": Saved(
        lambda: One(Experts(inner=6)),
        tokens(),
        {**EXPERTS, "r": 2, "fold": {"layer.up": "expert (half out) in, half=2"}},
    ),
    "fold_of_an_attention": lone(
        lambda: nn.MultiheadAttention(12, 3, batch_first=True),
        sequence(12, 12, 12),
        r=3,
        fold={"layer.in_proj_weight": "(qkv dim) embed, qkv=3"},
    ),
    "budget_fraction": Saved(Net, IMAGES, {**NET, "budget": 0.5}),
    "budget_count": Saved(Net, IMAGES, {**NET, "budget": 200}),
    "rank_pattern": Saved(Net, IMAGES, {**NET, "rank_pattern": {"conv": [2, 3, 1, 2], "blocks.1.up": 5, "down": 2}}),
    "scale": Saved(linear, x(3, 13), {"scale": 0.25}),
    "scale_pattern": Saved(
        Net, IMAGES, {**NET, "scale": 2.0, "scale_pattern": {r".*\.up": 0.5, "blocks.2.down.weight": 3.0}}
    ),
    "alpha": Saved(Net, IMAGES, {**NET, "alpha": 6.0}),
    "alpha_rank_pattern": Saved(Net, IMAGES, {**NET, "alpha": 4.0, "rank_pattern": {"up": 2}}),
    "alpha_scale_pattern": Saved(Net, IMAGES, {**NET, "alpha": 4.0, "scale_pattern": {"conv": 0.75}}),
    "path_rebuild_linear": Saved(linear, x(3, 13), {"path": "rebuild"}),
    "path_factored_linear": Saved(linear, x(3, 13), {"path": "factored"}),
    "path_rebuild_conv": Saved(conv2d, x(2, 7, 7, 9), {"path": "rebuild"}),
    "path_factored_conv": Saved(conv2d, x(2, 7, 7, 9), {"path": "factored"}),
    "dropout": Saved(linear, x(3, 13), {"dropout": 0.5}),
    "bias_all": Saved(Net, IMAGES, {"target_modules": ["conv", "up"], "bias": "all"}),
    "bias_tucker_only": Saved(Net, IMAGES, {"target_modules": ["conv", "up"], "bias": "tucker_only"}),
    "modules_to_save": Saved(Net, IMAGES, {"target_modules": "all-conv", "modules_to_save": ["head", "norm"]}),
    "modules_to_save_bias_all": Saved(
        Net,
        IMAGES,
        {"target_modules": "all-linear", "exclude_modules": ["head"], "modules_to_save": ["head"], "bias": "all"},
    ),
    "layers_to_transform": Saved(
        Net, IMAGES, {"target_modules": ["up"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"}
    ),
    "regular_expression": Saved(Net, IMAGES, {"target_modules": r"blocks\.[01]\.(up|down)"}),
    "trainable_token_indices": Saved(
        Words, ids(17, 3, 7), {"target_modules": ["head"], "trainable_token_indices": {"embed": [1, 4, 11, 12]}}
    ),
    **{
        f"init_{name}": Saved(Net, IMAGES, {**NET, "init": name})
        for name in ("zero_first", "orthogonal", "paper_conv", "paper_nlu", "paper_llm")
    },
    "init_weights_false": Saved(Net, IMAGES, {**NET, "init_weights": False}),
    "two_adapters": Saved(Net, IMAGES, NET, {"target_modules": ["conv", "up", "head"], "r": 2, "scale": 0.5}),
    "weighted_sum": Saved(Net, IMAGES, NET, {**NET, "r": 2, "scale": 0.5}, summed=True),
    "gpt2": Saved(gpt2, ids(19, 2, 6), {"target_modules": None, "task_type": "CAUSAL_LM"}),
    "bert_classifier": Saved(
        bert, ids(19, 2, 6), {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS", "r": 2}
    ),
    "linear_float32": Saved(linear, x(3, 13), dtype=torch.float32),
    "conv2d_float32": Saved(conv2d, x(2, 7, 7, 9), dtype=torch.float32),
    "linear_bfloat16": Saved(linear, x(3, 13), dtype=torch.bfloat16),
    "resaved_net": Saved(
        Net,
        IMAGES,
        {
            "target_modules": "all",
            "exclude_modules": ["head"],
            "modules_to_save": ["head"],
            "scale_pattern": {"conv": 2.0},
        },
        resaved=True,
    ),
    "resaved_attention": Saved(
        lambda: One(nn.MultiheadAttention(10, 2, batch_first=True)), sequence(10, 10, 10), resaved=True
    ),
    "resaved_experts": Saved(lambda: One(Experts()), tokens(), EXPERTS, resaved=True),
    "resaved_transposed_conv": Saved(
        lambda: One(nn.ConvTranspose2d(6, 9, 3, groups=3)), x(1, 6, 3, 2), {"bias": "tucker_only"}, resaved=True
    ),
}

CASES: dict[str, Saved] = {**LAYERS, **FEATURES}


# ---- writing ---------------------------------------------------------------------------------------------------------


def config_of(fields: dict[str, Any]) -> flora.FloraConfig:
    return flora.FloraConfig(**{"r": 3, "target_modules": ["layer"], **fields})


def adapted(case: Saved, key: str) -> PeftModel:
    """The model with its adapters, nothing in them zero."""
    torch.manual_seed(0)
    model = get_peft_model(case.base(), config_of(case.config))
    perturb(model, key)
    if case.second is not None:
        model.add_adapter(SECOND, config_of(case.second))
        model.set_adapter(SECOND)
        perturb(model, f"{key} {SECOND}")
        model.set_adapter("default")
    if case.summed:
        model.base_model.add_weighted_adapter(["default", SECOND], [0.5, -2.0], "summed")
        model.set_adapter("summed")
        for name in ("default", SECOND):
            model.delete_adapter(name)
    return model.eval()


def expected(case: Saved, key: str, active: list[str]) -> dict[str, Tensor]:
    """The output with these adapters, and the weights that merging them changes."""
    model, before = adapted(case, key), weights_of(case.base())
    model.base_model.set_adapter(active)
    found = case.run(model)
    merged = weights_of(model.merge_and_unload())
    assert merged.keys() == before.keys()
    changed = {f"merged.{name}": value for name, value in merged.items() if not torch.equal(value, before[name])}
    assert changed
    return {**found, **changed}


def write(name: str, folder: Path) -> None:
    """Writes a case, from a model that knows nothing of the file."""
    case = CASES[name]
    model = adapted(case, name)
    with tempfile.TemporaryDirectory() as first:
        model.save_pretrained(first if case.resaved or case.summed else folder)
        if case.resaved:
            flora.save(flora.load(first, base=case.base()), folder)
        if case.summed:
            Path(first, "summed").rename(folder)
    for card in folder.rglob("README.md"):
        card.unlink()
    for place in case.adapters(folder):
        default = "summed" if case.summed else "default"
        save_file(expected(case, name, [SECOND if place != folder else default]), place / EXPECTED)
    if case.second is not None and not case.summed:
        save_file(expected(case, name, ["default", SECOND]), folder / BOTH)


if __name__ == "__main__":
    for name in CASES:
        if not (FOLDER / name).exists():
            write(name, FOLDER / name)
            print(name)
