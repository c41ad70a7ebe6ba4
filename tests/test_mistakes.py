"""What people get wrong in their first hours, and what they are told: what it is, what was expected, what to do.

Each row of ``COMMANDS`` is a command in a folder with models, adapters and data, and parts of the line that it ends
with. Each row of ``CALLS`` is a call in Python, and parts of what it raises.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import flora
import flora_cli
from convert_cases import random_adapter
from flora import FloraConfig, Tucker, TuckerDelta
from flora.convert import load, save
from foreign_models import build
from test_extract import save_model, tuned

BATCH = torch.randn(2, 3, 9, 9)
WEIGHT = torch.randn(13, 7, 3, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as people have it: models, adapters, data, and files that are none of these."""
    root = tmp_path_factory.mktemp("mistakes")
    save_model(build("gpt2"), root / "base")
    save_model(build("mixtral"), root / "other")
    save_model(tuned("gpt2"), root / "tuned")
    adapter = random_adapter(build("gpt2"), lambda name, value: value.ndim > 1 and "e.weight" not in name)
    save(adapter, root / "adapter")
    save(adapter, root / "lora", format="lora")

    for folder in ("empty", "scans", "photos/cat", "photos/dog", "ia3"):
        (root / folder).mkdir(parents=True)

    (root / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (root / "chats.jsonl").write_text('{"question": "Why?", "reply": "So."}\n')
    (root / "notes.txt").write_text("not a model")
    (root / "net.py").write_text("from torch import nn\n")
    (root / "weights.pt").write_bytes(b"PK\x03\x04 nothing")
    (root / "bad.yaml").write_text("recipe: digits\n  task: [\n")

    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


TRAIN = "train digits-tiny"
COMMANDS: dict[str, tuple[str, ...]] = {
    # ---- the command itself
    "": ("missing VERB, one of train, eval",),
    "trian digits": ("'trian'", "choose from 'train'", "did you mean 'train'?"),
    "--verson": ("unrecognized arguments: --verson", "did you mean '--version'?"),
    "train": ("required: CONFIG;", "`flora train --help` shows examples"),
    "train digits-tiny --output x": ("--output", "written without dashes, as output=VALUE"),
    "train digits-tiny adapter": ("'adapter' is not an override", "write key=value, such as adapter.r=4"),
    "train digts": ("no config 'digts'", "did you mean 'digits'?", "packaged config (audio_classify,"),
    "train photos": ("'photos' is a folder, expected a YAML file", "task.data=photos"),
    "train bad.yaml": ("bad.yaml is not valid YAML", "line 2"),
    # ---- keys and values
    f"{TRAIN} adapter.rank=8": ("unknown key 'adapter.rank'", "did you mean 'adapter.r'?"),
    f"{TRAIN} adapter.lora_alpha=16": ("'adapter.lora_alpha'", "did you mean 'adapter.alpha'?"),
    f"{TRAIN} adapter.lora_dropout=0.1": ("did you mean 'adapter.dropout'?",),
    f"{TRAIN} adapter.target_module=all": ("did you mean 'adapter.target_modules'?",),
    f"{TRAIN} training.lr=0.1": ("unknown key 'training.lr'", "did you mean 'training.learning_rate'?"),
    f"{TRAIN} training.batch_size=3": ("did you mean 'training.per_device_train_batch_size'?",),
    f"{TRAIN} training.epochs=3": ("did you mean 'training.num_train_epochs'?",),
    f"{TRAIN} training.warmup_ratio=0.1": ("did you mean 'training.warmup_steps'?",),
    f"{TRAIN} training.workers=2": ("did you mean 'training.dataloader_num_workers'?",),
    f"{TRAIN} lr=3": ("unknown key 'lr' in the command line", "did you mean 'training.learning_rate'?"),
    f"{TRAIN} task.labels=3": ("did you mean 'task.labels_per_class'?",),
    "compare digits-tiny compare.learning_rate=[1]": ("did you mean 'compare.learning_rates'?",),
    f"{TRAIN} adapter.r=x": ("adapter.r=x: adapter.r is 'x', expected int or list[int] (Rank of",),
    f"{TRAIN} adapter.r=0": ("adapter.r=0: adapter.r must be at least 1, got 0",),
    f"{TRAIN} adapter.scale=big": ("adapter.scale is 'big', expected float or null",),
    f"{TRAIN} adapter.scale=0": ("must not be 0", "learn nothing; 1 is usual"),
    f"{TRAIN} adapter.dropout=1.5": ("adapter.dropout must be at least 0 and below 1, got 1.5; 0 turns it off",),
    f"{TRAIN} adapter.budget=5%": (
        "adapter.budget is '5%', expected float or int or null (Parameters",
        "a fraction below 1",
    ),
    f"{TRAIN} adapter.budget=-1": ("a fraction below 1 or a count from 1, got -1", "0.01 is one percent"),
    f"{TRAIN} adapter.init=orthogonl": ("expected one of zero_first, orthogonal", "did you mean 'orthogonal'?"),
    f"{TRAIN} adapter.start=grad": (
        "adapter.start=grad: adapter.start is 'grad', expected one of init, gradient, gradient-ranks",
    ),
    f"{TRAIN} adapter.way=fast": ("adapter.way is 'fast', expected auto or summed or beside",),
    f"{TRAIN} adapter.bias=lora_only": ("expected none or all or tucker_only",),
    f"{TRAIN} training.learning_rate=1000": ("training.learning_rate is 1000, expected above 0", "1e-4 to 1e-2"),
    f"{TRAIN} training.learning_rate=0": ("training.learning_rate is 0, expected above 0",),
    f"{TRAIN} training.learning_rate=high": ("training.learning_rate is 'high', expected float",),
    f"{TRAIN} training.num_train_epochs=0": (
        "training.num_train_epochs is 0, expected above 0; a part of an epoch is 0.5",
    ),
    f"{TRAIN} training.max_steps=0": ("training.max_steps is 0, expected 1 or more", "-1 counts epochs"),
    f"{TRAIN} training.per_device_train_batch_size=0": ("is 0, expected 1 or more",),
    f"{TRAIN} training.gradient_accumulation_steps=0": ("is 0, expected 1 or more",),
    f"{TRAIN} training.weight_decay=-1": ("training.weight_decay is -1.0, expected 0 or more",),
    f"{TRAIN} training.dataloader_num_workers=-1": ("is -1, expected 0 or more",),
    f"{TRAIN} training.save_steps=0": ("training.save_steps is 0", "a share of the run such as 0.1"),
    f"{TRAIN} training.report_to=wandbb": ("training.report_to is 'wandbb'", "install the package", "none"),
    f"{TRAIN} training.optim=adamm": ("training.optim is 'adamm', expected one of adamw_torch,", "did you mean"),
    f"{TRAIN} training.lr_scheduler_type=cosin": (
        "training.lr_scheduler_type is 'cosin', expected",
        "did you mean 'cosine'?",
    ),
    f"{TRAIN} training.eval_strategy=epochs": ("training.eval_strategy is 'epochs'", "did you mean 'epoch'?"),
    f"{TRAIN} training.bf16=true": ("this machine cannot train in bfloat16: set training.bf16=false",),
    f"{TRAIN} training.deepspeed=zero.json": ("needs deepspeed, which is not installed: pip install deepspeed",),
    f"{TRAIN} training.load_best_model_at_end=true": ("set training.eval_strategy=epoch and training.save_strategy=",),
    f"{TRAIN} seed=abc": ("seed is 'abc', expected int",),
    f"{TRAIN} seed=-1": ("seed is -1, expected 0 to 4294967295",),
    f"{TRAIN} resume=maybe": ("resume is a flag now; write --resume",),
    f"{TRAIN} task.labels_per_class=0": ("task.labels_per_class is 0, expected 1 to",),
    f"{TRAIN} compare.budgets=[0]": ("compare.budgets is [0], expected counts of parameters from 1",),
    # ---- where it is written
    f"{TRAIN} output=": ("output is '', expected the path of a folder",),
    f"{TRAIN} output=notes.txt": ("notes.txt is not a folder", "set output=FOLDER"),
    f"{TRAIN} output=base": ("base is not an output folder of flora", "set output=FOLDER"),
    # ---- data and models
    "train vision_classify-tiny task.data=photoz": ("no such file or folder here", "did you mean 'photos'?"),
    "train vision_classify-tiny task.data=photos": ("the class folder photos/cat has no files (.png", "fill or remove"),
    "train vision_classify-tiny task.data=notes.txt": ("notes.txt is a file", "a sub-folder of files for each class"),
    "train vision_classify-tiny task.data=empty": ("empty has no sub-folders", "each class into a folder"),
    "train vision_classify-tiny task.model=photos": ("AutoImageProcessor cannot load it", "the folder needs the files"),
    "train vision_classify-tiny task.data=sample:vision/shape": ("is not a sample", "did you mean 'vision/shapes'?"),
    "train vision_segment-tiny task.data=scans": (
        "scans has no folder `images`; put the images into scans/images",
        "scans/annotations",
    ),
    "train vision_detect-tiny task.data=scans": (
        "scans has 0 JSON files, expected one with the boxes",
        "COCO's format; put it there",
    ),
    "train audio_classify-tiny task.data=scans": ("scans has no sub-folders",),
    "train text_causal-tiny task.data=chats.json": ("did you mean 'chats.jsonl'?",),
    "train text_causal-tiny task.data=chats.jsonl": ("chats.jsonl:1", "'question', 'reply'", "task.columns={prompt:"),
    "train text_causal-tiny task.data=notes.txt": ("expected a file (.jsonl, .json, .csv, .tsv)",),
    "train text_causal-tiny task.columns={question:prompt}": ("task.columns has 'question'", "prompt, completion"),
    "train text_causal-tiny task.load_in_4bit=yeah": ("task.load_in_4bit is 'yeah', expected bool",),
    "train text_causal-tiny task.held_out=0.9": ("task.held_out is 0.9, expected a share between 0 and 0.5",),
    "train text_causal-tiny training.max_length=0": ("training.max_length is 0, expected 1 or more",),
    "train text_glue-tiny task.name=sst": ("task.name is 'sst', expected one of cola, sst2",),
    "train multimodal_chat-tiny task.data=chats.jsonl": ("chats.jsonl:1: lacks 'conversations'", "'question', 'reply'"),
    # ---- eval, predict, compare
    "eval": ("required: FOLDER;", "`flora eval --help`"),
    "eval nowhere": ("nowhere/config.yaml does not exist", "a folder that `flora train` wrote"),
    "eval adapter": ("adapter/config.yaml does not exist", "a folder that `flora train` wrote"),
    "predict nowhere photo.jpg": ("nowhere/config.yaml does not exist", "a folder that `flora train` wrote"),
    "predict adapter": ("required: INPUT;", "`flora predict --help`"),
    "compare digits-tiny --methods flra": ("unknown method 'flra'", "did you mean 'flora'?"),
    "compare digits-tiny --methods flora,flora": ("--methods is 'flora,flora'", "each of them once"),
    "compare digits-tiny --seeds one": ("--seeds: 'one' is not a list of whole numbers such as 0,1,2",),
    "compare digits-tiny compare.learning_rates=[]": ("compare.learning_rates is [], expected one or more above 0",),
    # ---- plan, inspect
    "plan net.py": ("it is a Python file", "FILE.py:FUNCTION"),
    "plan adapter": ("it is an adapter", "its base model"),
    "plan empty": ("the folder has no config.json", "save_pretrained"),
    "plan base --r eight": ("--r: 'eight' is not a whole number such as 8",),
    "plan base --r 0": ("r must be at least 1, got 0",),
    "plan base --rank 8": ("unrecognized arguments: --rank 8", "did you mean '--r'?", "`flora plan --help`"),
    "plan base --budget 5%": ("'5%' is not a count of parameters such as 500000, or a fraction",),
    "plan base --positions 0": ("--positions: '0' is below 1",),
    "plan base --target-modules q_proj": ("['q_proj'] not found in the base model GPT2LMHeadModel", "try 'c_proj'"),
    "plan base --target-modules all_linear": ("did you mean target_modules='all-linear'",),
    "plan base --target-parameters c_fc.weigth": ("match no parameter of", "did you mean 'c_fc.weight'"),
    "inspect nowhere": ("adapter not found: nowhere does not exist; check the path",),
    "inspect base": ("base is the folder of a whole model, expected that of an adapter", "flora extract"),
    "inspect adaptr": ("adapter not found: adaptr does not exist; did you mean 'adapter'?",),
    "inspect notes.txt": ("notes.txt is not a file of tensors (.safetensors, .pt",),
    "inspect lora/adapter_model.safetensors": ("is only the weights of an adapter", "give its folder, lora"),
    "inspect ia3": ("has peft_type 'IA3'", "only TUCKER (ours) and LORA"),
    "inspect adapter --html notes.txt": ("notes.txt exists", "choose another output", "--overwrite"),
    # ---- merge, convert, extract
    "merge adapter": ("required: --out;", "`flora merge --help`"),
    "merge adapter --out new": ("adapter names no base model", "--base"),
    "merge base --out new": ("base is the folder of a whole model",),
    "merge adapter --base other --out new": ("the base model has no weight 'transformer.h", "was trained on"),
    "merge adapter --base net.py --out new": ("net.py is not a safetensors file", "a model's folder"),
    "merge adapter --base base --out notes.txt": ("notes.txt exists", "--overwrite"),
    "merge adapter --base base --out new --weights 1 2": ("--weights has 2 numbers for 1 adapters",),
    "merge adapter --base base --out new --weights half": ("'half' is not a number such as 0.9",),
    "convert adapter --to loar --out new": ("choose from 'flora', 'lora'", "did you mean 'lora'?"),
    "convert adapter --to lora --out new.safetensors": ("'lora' is a folder", "without .safetensors"),
    "convert adapter --to kohya --out new": ("'kohya' is one file", "ends in .safetensors"),
    "convert adapter --to lora --prefix lora_unet --out new": ("belong to the format 'kohya'", "leave them out"),
    "convert adapter --to lora --scale 2 --out new": ("which stores the scale", "leave scale out"),
    "convert adapter/adapter_model.safetensors --to lora --out new": ("give its folder, adapter",),
    "convert base --to lora --out new": ("base is the folder of a whole model",),
    "convert weights.pt --to flora --out new": ("weights.pt is truncated, corrupt", "as safetensors"),
    "extract base tuned --out new": ("exactly one of rank, energy and budget (--rank, --energy, --budget), got none",),
    "extract base tuned --rank 2 --energy 0.5 --out new": ("got rank and energy",),
    "extract base tuned --energy 2 --out new": ("above 0 and at most 1, got 2.0; 0.9 is usual",),
    "extract base tuned --energy 90% --out new": ("'90%' is not a number such as 0.9",),
    "extract base tuned --budget 1 --out new": ("budget of 1 parameters is too small for any layer", "raise it"),
    "extract base other --rank 2 --out new": (
        "other lacks",
        "not a fine-tune of that model",
        "give the model that it was fine-tuned from",
    ),
    "extract base base --rank 2 --out new": (
        "base does not differ from base",
        "nothing to extract; give the base model first",
    ),
    "extract base adapter --rank 2 --out new": ("adapter is an adapter, expected a whole model",),
    # ---- recipes
    "recipes copy": ("missing NAME: flora recipes copy NAME",),
    "recipes copy digts": ("no config 'digts' is packaged", "did you mean 'digits'?"),
    "recipes show digits": ("'show'", "choose from 'list', 'copy', 'keys'"),
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_mistake_on_the_command_line(
    line: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))

    try:
        code: Any = flora_cli.main(line.split())
    except SystemExit as end:
        code = end.code

    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1, "no report of a library and no traceback comes before it"
    assert error.startswith("flora")
    assert ": error: " in error
    missing = [part for part in COMMANDS[line] if part not in error]
    assert not missing, error
    assert sorted(place.rglob("*")) == before


# ---- in Python -----------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = {"conv": nn.Conv2d(3, 8, 3), "act": nn.ReLU(), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, head=nn.Linear(8, 5)))


def config(**given: Any) -> FloraConfig:
    return FloraConfig(**{"target_modules": ["conv"], **given})


def adapted(**given: Any) -> Any:
    return get_peft_model(network(), config(**given))


def summed(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]).sum()


NAMES = SimpleNamespace(
    flora=flora, nn=nn, torch=torch, FloraConfig=FloraConfig, LoraConfig=LoraConfig, PeftModel=PeftModel, Tucker=Tucker,
    TuckerDelta=TuckerDelta, attach=get_peft_model, network=network, config=config, adapted=adapted, summed=summed,
    W=WEIGHT, x=BATCH, data=[(BATCH,)] * 4, read=load,
)  # fmt: skip
CALLS: dict[str, tuple[str, ...]] = {
    # ---- FloraConfig
    "FloraConfig(lora_alpha=16)": ("has no lora_alpha", "write alpha (or scale"),
    "FloraConfig(lora_dropout=0.1)": ("write dropout",),
    "FloraConfig(use_dora=True)": ("has no use_dora", "no magnitude"),
    "FloraConfig(use_rslora=True)": ("write scale",),
    "FloraConfig(rank=4)": ("has no rank; write r",),
    "FloraConfig(ranks=[4, 4])": ("write r, which takes a list too",),
    "FloraConfig(lr=0.1)": ("belongs to your optimiser",),
    "FloraConfig(target_module='all')": ("'target_module'; did you mean 'target_modules'?",),
    "FloraConfig(16)": ("takes its fields by name, got 16", "FloraConfig(r=8)"),
    "FloraConfig(r='8')": ("r must be an int, got '8' of type str",),
    "FloraConfig(r=None)": ("r must be an int or a list", "got None"),
    "FloraConfig(r=[])": ("r is an empty list", "one rank per dimension or a single int"),
    "FloraConfig(r=[4, 'a'])": ("r[1] must be an int, got 'a'",),
    "FloraConfig(kernel_r=(2, 2))": ("kernel_r must be an int, got (2, 2)",),
    "FloraConfig(scale=2, alpha=4)": ("scale=2 and alpha=4 are both given", "give one of them"),
    "FloraConfig(alpha=0)": ("must not be 0", "learn nothing; 1 is usual"),
    "FloraConfig(scale=float('nan'))": ("scale must be a finite number", "got nan"),
    "FloraConfig(r=[2, 2], alpha=4)": ("alpha sets s = alpha / r and needs one int r", "give scale"),
    "FloraConfig(dropout='0.1')": ("dropout must be a number, got '0.1'",),
    "FloraConfig(init='gaussian')": ("init is 'gaussian', expected one of zero_first",),
    "FloraConfig(init_weights='gaussian')": ("init_weights must be true or false, got 'gaussian'",),
    "FloraConfig(budget='5%')": ("budget must be a number, got '5%'",),
    "FloraConfig(budget=1.5)": ("count of parameters and must be whole, got 1.5",),
    "FloraConfig(bias='lora_only')": ("expected one of none, all, tucker_only", "did you mean 'tucker_only'?"),
    "FloraConfig(target_modules=[nn.Conv2d])": ("got the class Conv2d", "print(model)", "'all-conv'"),
    "FloraConfig(target_modules='[conv')": ("'[conv'", "regular expression: unterminated character set", "a backslash"),
    "FloraConfig(modules_to_save='head')": ("modules_to_save must be a list of names, got 'head'",),
    "FloraConfig(rank_pattern=['conv'])": ("rank_pattern must map names", "got ['conv']"),
    "FloraConfig(fold={'conv': 3})": ("must be a text such as '(heads dim) in, heads=12', got 3",),
    "FloraConfig(layers_pattern='h')": ("layers_pattern needs layers_to_transform",),
    # ---- attaching
    "attach(network(), FloraConfig())": ("target_modules is not set", "'all-norm', or names"),
    "attach(network(), config(target_modules=['conf']))": ("['conf'] not found", "instead of 'conf' try 'conv'"),
    "attach(network(), config(target_modules='all_conv'))": (
        "all_conv not found",
        "did you mean",
        "'all-conv'? Please",
    ),
    "attach(network(), config(target_modules=['all_conv']))": ("['all_conv'] not found", "'all-conv'? Please"),
    "attach(network(), config(target_modules=['act']))": (
        "act (ReLU) is not supported",
        "no weights of its own, so leave it out",
    ),
    "attach(network(), config(modules_to_save=['heads']))": ("match no module", "did you mean 'head'?"),
    "attach(network(), config(r=[2, 2]))": ("ranks (2, 2) have 2 entries", "has 4 dims", "one rank per dim"),
    "attach(network(), config(r=[9, 2, 2, 2]))": ("rank 9 of mode 'out' is above its size 8", "give at most 8"),
    "attach(network(), config(budget=3))": ("budget of 3 parameters is below 27", "raise the budget"),
    "attach(network(), config(target_modules=None, target_parameters=['conv.weigth']))": (
        "match no parameter of Sequential",
        "did you mean 'conv.weight'?",
    ),
    "attach(network(), config(fold={'conv': '(a b) i h w, a=3'}))": ("does not fit conv.weight of shape (8, 3, 3, 3)",),
    "adapted().add_adapter('b', LoraConfig(target_modules=['conv']))": ("Cannot combine adapters",),
    "adapted().merge_and_unload(adapter_names=['zz'])": ("unknown adapters ['zz']", "give some of ['default']"),
    "adapted().merge_adapter(['zz'])": ("unknown adapters ['zz']", "give some of ['default']"),
    "PeftModel.from_pretrained(network(), 'nowhere')": ("Can't find 'adapter_config.json' at 'nowhere'",),
    "PeftModel.from_pretrained(network(), 'adapter')": (
        "not found in the base model Sequential",
        "load it on that one",
    ),
    # ---- plan, decompose, forms
    "flora.plan(W, (4, 3, 2, 2))": ("shape is a Tensor", "give weight.shape"),
    "flora.plan(512, 8)": ("such as (64, 3, 7, 7), got a int",),
    "flora.plan('model', 8)": ("must be the sizes of a weight's dimensions", "got a str"),
    "flora.plan((512, 256, 3, 3), (8, 8))": ("ranks (8, 8) and shape (512, 256, 3, 3)", "one rank per dimension"),
    "flora.plan((512, 256, 3, 3), (8, 8, 4, 2))": ("rank 4 of mode 2 is above its size 3", "give at most 3"),
    "flora.plan((512, 256), '8')": ("ranks must be an int, got '8'",),
    "flora.plan_model(network(), 8)": ("plan_model needs a FloraConfig, got 8", "FloraConfig(r=8"),
    "flora.plan_model('base', config())": ("needs a model in memory, got a str", "flora plan base"),
    "flora.plan_model(network(), config(target_modules=['x']))": ("['x'] not found", "print(model)"),
    "flora.decompose(W, (4, 4))": ("ranks (4, 4) have 2 entries", "has 4 dims", "one rank per dim or a single int"),
    "flora.decompose(W, '4')": ("r must be an int, got '4' of type str",),
    "flora.decompose(W * float('nan'), 3)": ("with NaN or infinite entries", "give one that is finite"),
    "flora.decompose(W.numpy(), 3)": ("needs a tensor, got a ndarray", "torch.as_tensor"),
    "flora.decompose(network().conv, 3)": ("needs a tensor, got a Conv2d", "layer.weight"),
    "flora.decompose(torch.tensor(3.0), 3)": ("got a single number",),
    "TuckerDelta((64, 3, 3, 3), 8)": ("ranks is 8, expected one rank per dimension of (64, 3, 3, 3)",),
    "TuckerDelta((64, 3, 3, 3), (8, 3))": ("ranks (8, 3) do not fit the shape (64, 3, 3, 3)",),
    "TuckerDelta((64, 3), (8, 3), scale='1')": ("scale must be a number, got '1' of type str",),
    "TuckerDelta((64, 3), (8, 3), init='x')": ("init is 'x', expected one of zero_first",),
    "TuckerDelta(W, (4, 3, 2, 2))": ("shape is a Tensor", "give weight.shape"),
    "Tucker([1, 2], (None, None))": ("the core must be a tensor, got a list",),
    "Tucker(torch.ones(2, 2), (torch.ones(3, 2),))": ("needs 2 factors, got 1", "None for a mode that is kept whole"),
    "flora.FLoraConfig": ("no attribute 'FLoraConfig'; did you mean flora.FloraConfig?",),
    # ---- load, save, extract
    "flora.load('nowhere')": ("adapter not found: nowhere does not exist; check the path",),
    "flora.load('base')": ("base is the folder of a whole model",),
    "flora.load('adapter/adapter_model.safetensors')": ("give its folder, adapter",),
    "flora.load(network())": ("an adapter is given by its path, got a Sequential", "save it first"),
    "flora.load('adapter', base='other')": ("the base model has no weight 'transformer.h",),
    "flora.load('net.py')": ("net.py is not a file of tensors (.safetensors, .pt",),
    "flora.save(read('adapter'), 'adapter')": ("adapter exists", "overwrite"),
    "flora.save(read('adapter'), 'new', format='loar')": (
        "did you mean 'lora'?",
        "format is 'loar', expected one of flora, lora",
    ),
    "flora.save(adapted(), 'new')": ("save needs an Adapter", "model.save_pretrained(folder)"),
    "flora.save('adapter', 'new')": ("got a str", "flora convert"),
    "flora.extract('base', 'tuned')": ("exactly one of rank, energy and budget", "got none"),
    "flora.extract('base', 'tuned', energy=90)": ("above 0 and at most 1, got 90",),
    "flora.extract('base', 'nowhere', rank=2)": ("model not found: nowhere does not exist; check the path",),
    "flora.extract(network(), 'tuned', rank=2)": ("the base model is given by its path, got a Sequential",),
    # ---- adapt, start
    "flora.adapt(network(), {'r': 3}, data)": ("adapt needs a FloraConfig, got {'r': 3}",),
    "flora.adapt(network(), config(), data, choose_ranks=True)": ("the config has none", "FloraConfig(budget=0.01)"),
    "flora.adapt(adapted(), config(), data)": ("the model already has an adapter", "flora.start(model, batches)"),
    "flora.adapt(network(), config(), [(x, x)] * 4)": ("cannot be called with a batch as it is", "loss=lambda"),
    "flora.start(network(), data)": ("the model has no FLoRA adapter 'default'", "get_peft_model first"),
    "flora.start(adapted(), data[:1])": ("needs two batches or more", "got 1"),
    "flora.start(adapted(), 3)": ("a loader or a list of batches, got a int",),
    "flora.start(adapted(), data)": ("without a loss; give loss=lambda model, batch",),
    "flora.start(adapted(), data, loss=3)": ("loss must be a function (model, batch) -> loss, got 3",),
    "flora.start(adapted(), data, loss=lambda m, b: m(b[0]))": ("one number in a tensor", "shape (2, 5)", "mean()"),
    "flora.start(adapted(), data, loss=summed, adapter_name='zz')": (
        "no FLoRA adapter 'zz'; give adapter_name one of default",
    ),
}


@pytest.mark.filterwarnings("ignore:.*target_modules.*match nothing:UserWarning")
@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_in_python(call: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))

    with pytest.raises((ValueError, TypeError, OSError, AttributeError)) as caught:
        eval(call, vars(NAMES))

    missing = [part for part in CALLS[call] if part not in str(caught.value)]
    assert not missing, str(caught.value)
    assert len(str(caught.value)) < 1200
    assert sorted(place.rglob("*")) == before


def test_there_are_a_hundred_and_every_door_is_among_them() -> None:
    assert len(COMMANDS) > 120
    assert len(CALLS) > 90
    assert {line.split()[0] for line in COMMANDS if line} >= set(flora_cli.COMMANDS)
    doors = ("load", "save", "extract", "decompose", "plan", "plan_model", "adapt", "start")
    assert all(any(call.startswith(f"flora.{door}(") for call in CALLS) for door in doors)


def test_a_budget_that_cannot_be_spent_is_said() -> None:
    with pytest.warns(UserWarning, match=r"budget of 10,000,000 parameters is more than .* they spend 108"):
        adapted(budget=10**7)


def test_an_extraction_is_not_called_exact(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["extract", str(place / "base"), str(place / "tuned"), "--rank", "2", "--out", str(tmp_path / "new")]
    assert flora_cli.main(argv) == 0
    printed = capsys.readouterr().out
    assert "exact" not in printed
    assert "the file holds what was extracted: largest error" in printed


def test_a_conversion_compares_adapters_and_not_what_lies_beside_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "run"
    save(load(place / "adapter"), source)
    (source / "checkpoint-8").mkdir()
    (source / "checkpoint-8" / "optimizer.pt").write_bytes(bytes(10**6))
    assert flora_cli.main(["convert", str(source), "--to", "lora", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert "exact (no SVD)" in printed
    assert "source" in printed
    assert "MB" not in printed
    assert "MiB" not in printed


def test_a_metric_that_no_evaluation_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"metric_for_best_model": "acuracy", "load_best_model_at_end": "true", "eval_steps": 1, "save_steps": 1}
    keys |= {"eval_strategy": "steps", "max_steps": 2, "disable_tqdm": "true"}
    items = [f"training.{key}={value}" for key, value in keys.items()]
    assert flora_cli.main(["train", "digits-tiny", "task.base_epochs=1", *items]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        "training.metric_for_best_model is 'acuracy', expected one of loss, accuracy; did you mean 'accuracy'?" in last
    )


def ends_with(error: BaseException) -> Callable[..., int]:
    def verb(args: object) -> int:
        raise error

    return verb


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["train", "my config.yaml", "seed=3"],
            "`flora train 'my config.yaml' seed=3 --resume` continues",
        ),
        (["extract", "base", "tuned", "--rank", "2", "--out", "x"], "the same `flora extract` command continues"),
        (["recipes"], "flora: error: interrupted\n"),
    ],
)
def test_an_interruption_says_how_to_continue(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flora_cli.COMMANDS, argv[0], ends_with(KeyboardInterrupt()))
    assert flora_cli.main(argv) == 130
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["digits-tiny", "text_causal-tiny"])
def test_the_help_of_a_recipe_explains_its_keys(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert flora_cli.main(["train", recipe, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "The task keys of" in printed
    assert "adapter.r: Rank of the channel modes" in printed
    assert "training.num_train_epochs=" in printed
    assert ("SFTConfig" in printed) == (recipe == "text_causal-tiny")


def test_without_a_terminal_progress_is_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["train", "digits-tiny", "output=out", "task.base_epochs=1", "training.max_steps=4"]
    assert flora_cli.main([*argv, "training.learning_rate=0.01"]) == 0
    error = capsys.readouterr().err
    assert "\r" not in error
    losses = [line for line in error.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in losses] == ["2/4", "4/4"]
    assert all("loss " in line and "learning_rate " in line for line in losses)
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 4


def test_a_plan_counts_what_is_trained_in_full() -> None:
    report = flora.plan_model(network(), config(r=2, modules_to_save=["head"])).report
    live = get_peft_model(network(), config(r=2, modules_to_save=["head"]))
    assert report["trainable_parameters"] == sum(v.numel() for v in live.parameters() if v.requires_grad)
    assert {"layer": "head (Linear)", "reason": "trained in full, in modules_to_save", "count": 1} in report["left_out"]
