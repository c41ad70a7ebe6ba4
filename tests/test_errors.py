"""What goes wrong is said in words that help, and leaves the model as it was: names, module types, values, outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from flora import FloraConfig
from flora.errors import nearest_path

X = torch.randn(2, 3, 11, 13, generator=torch.Generator().manual_seed(0))
WEIGHTS = "adapter_model.safetensors"


def network(inner: int = 13, classes: int = 7, *, second: bool = True) -> nn.Sequential:
    """Two convolutions and a head; the sizes are what an adapter may fit or not."""
    torch.manual_seed(0)
    features = OrderedDict[str, nn.Module](conv1=nn.Conv2d(3, inner, (3, 5), padding=1), act=nn.ReLU())
    if second:
        features["conv2"] = nn.Conv2d(inner, 11, 3)
    features.update(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    head = nn.Linear(11 if second else inner, classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(features), head=head))


def state_of(model: nn.Module) -> tuple[Any, ...]:
    values = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    return values, kinds, trained, hooks


@contextmanager
def untouched(model: nn.Module, x: torch.Tensor = X) -> Iterator[None]:
    """Fails unless the model is after the block what it was before, to the last bit."""
    out, before = model(x), state_of(model)  # the forward first: it may retire hooks that act once
    yield
    after = state_of(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
    assert after[1:] == before[1:]
    assert torch.equal(model(x), out)


# ---- requests ------------------------------------------------------------------------------------------------------

CONV1 = "features.conv1.weight (out=13, in=3, kh=3, kw=5)"
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"r": [4, 4, 2], "target_modules": ["conv1"]},
        ValueError,
        f"ranks (4, 4, 2) have 3 entries but {CONV1} has 4 dims; give one rank per dim or a single int",
    ),
    (  # the first target is all right, the second is not
        {"r": [4, 3, 2, 2], "target_modules": ["conv1", "head"]},
        ValueError,
        "ranks (4, 3, 2, 2) have 4 entries but head.weight (out=7, in=11) has 2 dims; give one rank per dim or a",
    ),
    (
        {"r": [14, 3, 2, 2], "target_modules": ["conv1"]},
        ValueError,
        f"rank 14 of mode 'out' is above its size 13 in {CONV1}; give at most 13 (a rank equal to the size keeps",
    ),
    (
        {"rank_pattern": {"conv1": [4, 3, 4, 2]}, "target_modules": ["conv1"]},
        ValueError,
        "rank 4 of mode 'kh' is above its",
    ),
    ({"r": 0, "target_modules": ["conv1"]}, ValueError, "r must be at least 1, got 0"),
    ({"r": -2, "target_modules": ["conv1"]}, ValueError, "r must be at least 1, got -2"),
    ({"r": 2.5, "target_modules": ["conv1"]}, TypeError, "r must be an int, got 2.5 of type float"),
    ({"r": True, "target_modules": ["conv1"]}, TypeError, "r must be an int, got True of type bool"),
    ({"scale": 2, "alpha": 8, "target_modules": ["conv1"]}, ValueError, "scale=2 and alpha=8 are both given"),
    (
        {"init": "ortogonal", "target_modules": ["conv1"]},
        ValueError,
        "init is 'ortogonal', expected one of zero_first, orthogonal,",
    ),
    (
        {"target_modules": ["conv3", "hed"]},
        ValueError,
        "Target modules ['conv3', 'hed'] not found in the base model Sequential: instead of 'conv3' try 'conv2', "
        "'conv1'; instead of 'hed' try 'head'. Please check the target modules; print(model) lists the names",
    ),
    (
        {"target_modules": ["zzz"]},
        ValueError,
        "Target modules ['zzz'] not found in the base model Sequential. Please check",
    ),
    ({"target_modules": r"nothing\..*"}, ValueError, r"Target modules nothing\..* not found in the base model"),
    (
        {"target_modules": ["act"]},
        ValueError,
        "Target module features.act (ReLU) is not supported: ReLU is not in the",
    ),
    ({"target_modules": ["conv1", "features"]}, ValueError, "Target module features (Sequential) is not supported: "),
    (
        {"budget": 9, "target_modules": ["conv1"]},
        ValueError,
        "budget of 9 parameters is below 36, the cost of rank 1 on the 1 targeted weight; raise the budget, lower",
    ),
]


@pytest.mark.parametrize(("given", "error", "text"), BAD)
def test_a_bad_request_leaves_the_model_alone(given: dict[str, Any], error: type[Exception], text: str) -> None:
    model = network()
    with untouched(model), pytest.raises(error) as caught:
        get_peft_model(model, FloraConfig(**given))
    assert str(caught.value).startswith(text)


def test_the_table_of_bad_requests_is_whole() -> None:
    assert len(BAD) == 16


def test_a_rank_spoilt_after_the_config_was_checked_is_caught() -> None:
    model, config = network(), FloraConfig(target_modules=["conv1"])
    config.r = 0
    with untouched(model), pytest.raises(ValueError, match="r must be at least 1, got 0"):
        get_peft_model(model, config)


def test_a_bad_second_adapter_leaves_the_first_alone() -> None:
    model = get_peft_model(network(), FloraConfig(r=2, target_modules=["conv1"], init_weights=False))
    with untouched(model), pytest.raises(ValueError, match="have 3 entries"):
        model.add_adapter("second", FloraConfig(r=[4, 4, 2], target_modules=["conv1"]))
    assert list(model.peft_config) == ["default"]


def test_a_lazy_module_is_named() -> None:
    model = nn.Sequential(OrderedDict(first=nn.LazyLinear(5), last=nn.Linear(5, 7)))
    with pytest.raises(ValueError) as caught:
        get_peft_model(model, FloraConfig(target_modules=["first"]))
    assert str(caught.value) == (
        "Target module first (LazyLinear) is not supported: its weight has no shape yet (lazy module); run one forward "
        "through the model first"
    )
    assert list(model.state_dict()) == ["first.weight", "first.bias", "last.weight", "last.bias"]
    model(torch.randn(2, 3))
    assert type(model.first) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")  # what is tested is the old one
def test_old_style_weight_norm_is_named() -> None:
    model = nn.Sequential(OrderedDict(first=nn.utils.weight_norm(nn.Linear(5, 3)), last=nn.Linear(3, 7)))
    with untouched(model, torch.randn(2, 5)), pytest.raises(ValueError) as caught:
        get_peft_model(model, FloraConfig(target_modules=["first"]))
    assert str(caught.value) == (
        "Target module first (Linear) is not supported: its weight is recomputed before every forward (old-style "
        "weight_norm or spectral_norm); use torch.nn.utils.parametrizations instead, or remove the norm first"
    )


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of both convolutions and the head of ``network()``."""
    config = FloraConfig(r=3, target_modules=["conv1", "conv2", "head"])
    get_peft_model(network(), config).save_pretrained(str(tmp_path))
    return tmp_path


said_first = pytest.mark.filterwarnings(  # what the tuner warns of on its way to the error
    "ignore:target_modules .* match nothing:UserWarning", "ignore:the adapter has more parameters:UserWarning"
)
MISFITS: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: network(inner=17), "'features.conv1' has"),
    (lambda: network(classes=5), "'head' has"),
    (lambda: network(second=False), "for the layer 'features.conv2', which the base model lacks"),
]


@said_first
@pytest.mark.parametrize(("build", "text"), MISFITS)
def test_an_adapter_of_another_model_names_the_first_layer_that_differs(
    build: Callable[[], nn.Module], text: str, saved: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        PeftModel.from_pretrained(build(), str(saved))
    assert str(caught.value).startswith("the adapter does not fit this base model: ")
    assert text in str(caught.value)
    assert str(caught.value).endswith("load it on the model it was trained on")


def test_the_table_of_misfits_is_whole() -> None:
    assert len(MISFITS) == 3


@said_first
@pytest.mark.parametrize(("build", "text"), MISFITS)
def test_an_adapter_of_another_model_leaves_it_alone(build: Callable[[], nn.Module], text: str, saved: Path) -> None:
    model = build()
    with untouched(model), pytest.raises(ValueError, match="does not fit this base model"):
        PeftModel.from_pretrained(model, str(saved))


def truncate(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])


@pytest.mark.parametrize("kept", [0, 5, 100, -7])
def test_a_truncated_file_is_refused(kept: int, saved: Path) -> None:
    truncate(saved, kept)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or corrupt: .*; copy or download"):
        PeftModel.from_pretrained(network(), str(saved))


@pytest.mark.parametrize("kept", [0, 5, 100, -7])
def test_a_truncated_file_leaves_the_model_alone_and_is_named(kept: int, saved: Path) -> None:
    truncate(saved, kept)
    model = network()
    with untouched(model), pytest.raises(ValueError, match=WEIGHTS):
        PeftModel.from_pretrained(model, str(saved))


def test_the_whole_file_loads(saved: Path) -> None:
    """The same folder, left whole: what the tests above refuse is the damage."""
    model = network()
    expected = model(X)
    assert torch.equal(PeftModel.from_pretrained(model, str(saved))(X), expected)


def test_what_is_near_is_not_asked_of_a_folder_that_may_not_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    assert nearest_path(tmp_path / "photoz") == f"; did you mean {str(tmp_path / 'photos')!r}?"

    def refuse(path: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert nearest_path(tmp_path / "photoz") == ""
