"""All formats together: round trips, detection, the authors' checkpoints, bad input, nothing half-written."""

from __future__ import annotations

import copy
import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flora
from convert_cases import CONV_AXES, difference, random_adapter, random_form
from flora.convert import FORMATS, Adapter, Entry, Layout, convert, detect, load, save
from flora.convert.report import compare
from flora.layers.layout import fold_groups
from flora.storage import tensors as convert_files
from foreign_models import build, logits

SIZES = st.sampled_from([1, 2, 3, 5, 7, 11])


@st.composite
def entries(draw: st.DrawFn) -> tuple[str, Entry]:
    """A weight of any kind that a format holds exactly, with its name."""
    kind = draw(st.sampled_from(["linear", "transposed", "embedding", "conv", "experts", "folded"]))
    if kind == "conv":
        dims = draw(st.integers(1, 3))
        shape = [draw(SIZES) for _ in range(2)] + [draw(st.integers(1, 3)) for _ in range(dims)]
        layout = Layout("conv", CONV_AXES[dims], draw(st.sampled_from([1, 1, 2, 3])))
    elif kind == "experts":
        shape = [draw(SIZES) for _ in range(3)]
        axes = draw(st.sampled_from([("expert", "out", "in"), ("expert", "in", "out")]))
        layout = Layout("experts", axes)
    elif kind == "folded":
        shape = [draw(SIZES) for _ in range(4)]
        layout = Layout("linear", ("out", "in"), fold=f"(a b) (c d), a={shape[0]} c={shape[2]}")
    else:
        shape = [draw(SIZES) for _ in range(2)]
        names = {"linear": ("out", "in"), "transposed": ("in", "out"), "embedding": ("vocab", "dim")}
        layout = Layout("linear" if kind == "transposed" else kind, names[kind])
    form = random_form(shape, [draw(st.integers(1, size)) for size in shape])
    name = "net.experts.proj" if kind == "experts" else "net.layer.weight"
    return name, Entry(form, draw(st.sampled_from([0.04, 1.0, -3.5])), layout)


def holds(kind: str, layout: Layout) -> bool:
    return kind != "lora" or (layout.kind != "conv" or layout.groups == 1)


@given(entries(), st.sampled_from(["flora", "lora", "kohya", "kohya-plain", "dense"]))
def test_round_trips_keep_the_change(
    tmp_path_factory: pytest.TempPathFactory, named: tuple[str, Entry], to: str
) -> None:
    name, entry = named
    adapter, folder = Adapter({name: entry}), tmp_path_factory.mktemp("trip")
    kind = to.removesuffix("-plain")
    target = folder / ("a" if kind in ("flora", "lora") else "a.safetensors")
    if not holds(kind, entry.layout):
        with pytest.raises(ValueError, match="groups"):
            save(adapter, target, format=kind)
        return
    report = save(adapter, target, format=kind, mid=not to.endswith("-plain"))
    assert detect(target) == kind
    assert report.relative_error <= 1e-6
    back = load(target)
    save(back, folder / "again", format="flora")
    again = load(folder / "again")
    assert difference(adapter, again) < 1e-6
    assert again.weights[name].shape == entry.shape


def test_a_live_adapter_of_every_kind_goes_out_and_comes_back(tmp_path: Path) -> None:
    """What PEFT saved, written again by us from the tensors alone, loads into PEFT with the same logits."""
    targets: dict[str, dict[str, object]] = {
        "mixed": {"target_modules": ["embed", "line", "plane.2", "space"], "modules_to_save": ["head"], "bias": "all"},
        "gpt2": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 2}, "scale_pattern": {"c_attn": 0.7}},
        "mixtral": {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    }
    for name, fields in targets.items():
        config = flora.FloraConfig(r=3, alpha=4.5, init_weights=False, **fields)
        model = get_peft_model(build(name), config).eval()
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.requires_grad and "tucker" not in key:
                    value.add_(0.3 * torch.randn(value.shape))
        model.save_pretrained(tmp_path / name)
        adapter = load(tmp_path / name, base=build(name))
        adapter.config = {}
        save(adapter, tmp_path / f"{name}-again")
        again = PeftModel.from_pretrained(build(name), tmp_path / f"{name}-again").eval()
        assert torch.allclose(logits(again, name), logits(model, name), atol=1e-5), name


class Twins(nn.Module):
    """Two raw parameters whose names end like those of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left_weight, self.right_weight = nn.Parameter(torch.randn(11, 13)), nn.Parameter(torch.randn(13, 7))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.left_weight @ self.right_weight


def test_raw_parameters_called_like_weights_load_into_peft_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Twins(), nn.Linear(7, 5))
    config = flora.FloraConfig(
        r=2, target_modules=["1"], target_parameters=["0.left_weight", "0.right_weight"], init_weights=False
    )
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "a")
    save(load(tmp_path / "a", base=base), tmp_path / "b")

    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b").eval()
    x = torch.randn(3, 11)
    assert torch.allclose(again(x), model(x), atol=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.attention(x, x, x)[0])[0]


def test_attention_and_recurrent_weights_are_unfolded_exactly(tmp_path: Path) -> None:
    model = get_peft_model(
        Recurrent(), flora.FloraConfig(r=2, target_modules=["attention", "lstm"], init_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "a")
    adapter = load(tmp_path / "a", base=Recurrent())
    x = torch.randn(2, 3, 6)
    expected = model(x)
    merged = model.merge_and_unload()
    base = Recurrent()
    base.load_state_dict(merged.state_dict())
    with torch.no_grad():
        for name, entry in adapter.weights.items():
            base.get_parameter(name).sub_(entry.dense())
            assert torch.allclose(Tensor(entry.stored_form().to_dense() * entry.scale), entry.dense(), atol=1e-6)
    assert "attention.out_proj.weight" in adapter.weights
    save(adapter, tmp_path / "again")
    again = PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert torch.allclose(again(x), expected, atol=1e-5)


def official_conv(path: Path) -> Tensor:
    """A file of the authors' convolution code; returns the change by their formula, written out."""
    shape, ranks = (5, 7, 3, 2), (3, 4, 2, 2)  # in, out, kernel
    core, factors = torch.randn(ranks), [torch.randn(size, rank) for size, rank in zip(shape, ranks, strict=True)]
    tensors = {"body.0.flora_layer.param_G": core, "body.0.base_layer.weight": torch.randn(7, 5, 3, 2)}
    tensors.update({f"body.0.flora_layer.param_{mode}": factor for mode, factor in enumerate(factors)})
    torch.save({"state_dict": tensors}, path)
    return torch.einsum("abcd,ia,ob,hc,wd->oihw", core, *factors)


def test_the_authors_convolution_checkpoint(tmp_path: Path) -> None:
    expected = official_conv(tmp_path / "a.pth")
    adapter = load(tmp_path / "a.pth", scale=4.0)
    assert torch.allclose(adapter.weights["body.0.weight"].dense(), 4 * expected, atol=1e-4)
    report = convert(tmp_path / "a.pth", tmp_path / "lora", to="lora", scale=4.0)
    assert report.relative_error < 1e-6
    with pytest.raises(ValueError, match=r"do not store the scale.*--scale"):
        load(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_the_authors_matrix_checkpoints(tmp_path: Path, suffix: str) -> None:
    a, e, b = torch.randn(3, 7), torch.randn(3, 3), torch.randn(11, 3)
    tensors = {f"deberta.q.lora_{key}{suffix}": value for key, value in {"A": a, "E": e, "B": b}.items()}
    save_file({**tensors, "classifier.weight": torch.ones(2, 11)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="were ignored .first: classifier.weight"):
        adapter = load(tmp_path / "a.safetensors", scale=2.0)
    assert torch.allclose(adapter.weights["deberta.q.weight"].dense(), 2 * b @ e @ a, atol=1e-5)
    del tensors[f"deberta.q.lora_A{suffix}"]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"deberta.q has the parts B, E, expected A, B, E"):
        load(tmp_path / "a.safetensors", scale=2.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(random_adapter(build("mixed"), lambda name, value: value.ndim > 1), tmp_path / "a")
    return tmp_path / "a"


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return run


def reconfigure(**fields: object) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return run


def note(text: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path), path, {"flora": text})

    return run


def replace_core(change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    key = HEAD + "core"
    return rewrite(lambda tensors: tensors.update({key: change(tensors[key]).contiguous()}))


HEAD = "base_model.model.head.tucker_weight."
BROKEN: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (truncate, ValueError, "adapter_model.safetensors is truncated or corrupt.*copy or download it again"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"junk"), ValueError, "is truncated or corrupt"),
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        FileNotFoundError,
        "adapter_model.safetensors does not exist",
    ),
    (
        lambda f: (f / "adapter_config.json").unlink(),
        FileNotFoundError,
        "it has no adapter_config.json; give",
    ),
    (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, "is not valid JSON"),
    (rewrite(lambda t: t.update({"model.x.weight": torch.ones(2)})), ValueError, "foreign keys: 'model.x.weight'"),
    (rewrite(lambda t: t[HEAD + "core"].fill_(float("nan"))), ValueError, "head.tucker_weight.core has NaN"),
    (
        rewrite(lambda t: t.update({HEAD + "factor_0": torch.ones(17, 5)})),
        ValueError,
        "head.weight: factor 0",
    ),
    (rewrite(lambda t: t.pop(HEAD + "core")), ValueError, "head.weight has factors but no core"),
    (
        rewrite(lambda t: t.update({HEAD + "factor_4": torch.ones(2, 2)})),
        ValueError,
        "head.weight has factor_4",
    ),
    (reconfigure(peft_type="LOHA"), ValueError, "peft_type 'LOHA'; only TUCKER .ours. and LORA"),
    (note('{"head.weight": 3}'), ValueError, "recorded layout of head.weight is 3"),
    (note('{"head.weight": {"kind": "conv", "axes": ["a"], "groups": "x"}}'), ValueError, "recorded layout of head"),
    (note('{"head.weight": {"kind": "conv", "axes": ["a"]}}'), ValueError, "head.weight has the shape .* the axes a"),
    (note("[1]"), ValueError, "metadata 'flora' is not the JSON object"),
    (note("[" * 5000), ValueError, "metadata 'flora' is not the JSON object"),
    (replace_core(lambda core: core.long()), ValueError, "head.tucker_weight.core has numbers of type torch.int64"),
    (replace_core(lambda core: core.to(torch.float8_e4m3fn)), ValueError, "has numbers of type torch.float8_e4m3fn"),
    (replace_core(lambda core: core[:0]), ValueError, r"head.tucker_weight.core has the shape \(0, 3\)"),
    (replace_core(lambda core: core.sum()), ValueError, r"head.tucker_weight.core has the shape \(\)"),
    (replace_core(lambda core: core[(None,) * 60]), ValueError, "head.tucker_weight.core has 62 dimensions"),
    (replace_core(lambda core: core.half()), ValueError, "tensors of head.weight have different types of numbers"),
    (reconfigure(modules_to_save=True), ValueError, "modules_to_save is 'True', expected a list of names"),
    (reconfigure(layout=3), ValueError, "layout is '3', expected a JSON object"),
    (reconfigure(base_model_name_or_path=[]), ValueError, "base_model_name_or_path is .*, expected a name"),
    (reconfigure(trainable_token_indices="all"), ValueError, "trainable_token_indices is 'all', expected row numbers"),
]


@pytest.mark.parametrize(("damage", "error", "message"), BROKEN)
def test_broken_adapters_give_one_clear_line(
    folder: Path, damage: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter not found"):
        load(tmp_path / "none")
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not an adapter that can be read"):
        load(tmp_path / "x.safetensors")
    (tmp_path / "evil.pt").write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match="truncated, corrupt, or holds objects other than tensors"):
        load(tmp_path / "evil.pt")


@pytest.mark.parametrize("to", ["flora", "lora", "kohya", "dense"])
def test_nothing_is_replaced_unasked_or_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    target = folder.parent / ("out" if to in ("flora", "lora") else "out.safetensors")
    adapter = load(folder)
    save(adapter, target, format=to)
    with pytest.raises(FileExistsError, match="exists; choose another output or ask to overwrite it"):
        save(adapter, target, format=to)
    before = sorted(folder.parent.rglob("*"))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_files, "stream_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save(adapter, target, format=to, overwrite=True)
    assert sorted(folder.parent.rglob("*")) == before
    monkeypatch.undo()
    assert difference(adapter, load(target)) < 1e-6
    save(adapter, target, format=to, overwrite=True)
    assert sorted(folder.parent.rglob("*")) == before


def test_options_that_do_not_apply_are_refused(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder)
    with pytest.raises(ValueError, match="expected one of flora, lora, kohya, dense"):
        save(adapter, tmp_path / "x", format="official")
    with pytest.raises(ValueError, match="belong to the format 'kohya'"):
        save(adapter, tmp_path / "x", format="lora", prefix="lora_te")
    with pytest.raises(ValueError, match=r"ends in .safetensors"):
        save(adapter, tmp_path / "x", format="dense")
    with pytest.raises(ValueError, match=r"without .safetensors"):
        save(adapter, tmp_path / "x.safetensors", format="lora")
    with pytest.raises(ValueError, match="changes no weight"):
        save(Adapter(), tmp_path / "x")
    with pytest.raises(ValueError, match="stores the scale"):
        load(folder, scale=2.0)
    assert len(FORMATS) == 5


def test_the_base_must_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match="the base model has no weight"):
        load(folder, base=build("gpt2"))


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ("(three heads dim) embed, three=3 heads=12", (3, 1)),
        ("a (b c)", (1, 2)),
        ("(gates hidden) input, gates=4", (2, 1)),
    ],
)
def test_folds_are_read(pattern: str, groups: tuple[int, ...]) -> None:
    assert fold_groups(pattern) == groups
    with pytest.raises(ValueError, match="is not a list of names and groups"):
        fold_groups("(a (b c)")


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of its entries, and with the mode that the umask asks for."""
    adapter = random_adapter(build("mixed"), lambda name, value: value.ndim > 1)
    turned = Adapter(dict(reversed(adapter.weights.items())), {}, {})
    other = (tmp_path / "other").with_suffix(".txt")
    other.write_text("made by the system's own rule")
    for kind, name in (("flora", "f"), ("lora", "l"), ("kohya", "k.safetensors"), ("dense", "d.safetensors")):
        first, second = tmp_path / "one" / name, tmp_path / "two" / name
        save(adapter, first, format=kind)
        save(turned, second, format=kind)
        for path in [first] if first.is_file() else sorted(first.iterdir()):
            twin = second if first.is_file() else second / path.name
            assert path.read_bytes() == twin.read_bytes(), path
            assert path.stat().st_mode == other.stat().st_mode, path


DTYPES = [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def test_every_dtype_is_written_as_safetensors_would(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.ones(3, 5).to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {"none": torch.ones(0, 3), "one": torch.tensor(2.5)}
    convert_files.write_tensors(tmp_path / "a.safetensors", tensors, {"b": "2", "a": "1"})
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert torch.equal(back[name].cfloat(), value.cfloat())


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file of tensors"):
        convert_files.read_tensors(tmp_path)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Path))  # a class: loading it without restriction would import it
    with pytest.raises(ValueError, match="holds objects other than tensors; nothing in it was run") as caught:
        convert_files.read_pickled(tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value)


def _in_itself() -> dict[str, object]:
    inner: dict[str, object] = {}
    inner["model"] = inner
    return inner


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_in_itself(), r"has no tensors; its keys are 'model'"),
        ({"state_dict": [torch.ones(2)]}, r"holds a list, expected a dict of tensors"),
        ({"w": torch.eye(3).to_sparse()}, "w is not a plain tensor of numbers"),
        ({"w": torch.empty(3, 5, device="meta")}, "w is not a plain tensor of numbers"),
        (
            {"w": torch.ones(1).expand(1 << 22, 1 << 22)},
            "w has 17,592,186,044,416 entries, more than",
        ),
    ],
    ids=["in itself", "list", "sparse", "meta", "repeated"],
)
def test_a_pickled_file_that_only_looks_like_weights_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=message):
        convert_files.read_pickled(tmp_path / "odd.pt")


def test_a_weight_larger_than_memory_is_converted_in_its_factors(tmp_path: Path) -> None:
    size, layout = 400_000, Layout("linear", ("out", "in"))
    huge = Adapter({"net.weight": Entry(random_form((size, size), (1, 2)), 0.5, layout)})
    for kind, name in (("flora", "f"), ("lora", "l"), ("kohya", "k.safetensors")):
        report = save(huge, tmp_path / name, format=kind)
        assert report.relative_error < 1e-6
        assert load(tmp_path / name).weights["net.weight"].shape == (size, size)
    with pytest.raises(ValueError, match=r"has 640.0 GB, more than the memory of this machine; write a format"):
        save(huge, tmp_path / "d.safetensors", format="dense")


def test_a_large_weight_that_was_written_wrong_is_noticed() -> None:
    layout = Layout("linear", ("out", "in"))
    size = 5_003  # squared, it is more than is compared number by number
    form = random_form((size, size), (2, 3))
    other = flora.Tucker(1.001 * form.core, form.factors)
    first, second = (Adapter({"net.weight": Entry(each, 0.5, layout)}) for each in (form, other))
    assert compare(first, first)[1] < 1e-12
    with pytest.raises(ValueError, match="net.weight: the written file differs from the source by 1.0e-03.*; run the"):
        compare(first, second)
