"""The house: every file has a room, imports point down, no drawer for odds and ends."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

from packaging.requirements import Requirement

import flora
from flora.runs import missing
from flora.runs.missing import EXTRAS
from readability import compute_density, densities

SRC = Path(flora.__file__).parents[1]
PACKAGE = "flora"

# A room is a folder of src/flora; `flora` is its __init__, `flora_cli` the file beside it. A room imports from rooms on
# the levels above its own in this list, and from nothing beside or below it; inside a room any order without a circle.
LEVELS: list[set[str]] = [
    {"errors"},
    {"tucker", "storage"},
    {"layers", "data"},
    {"tuner", "convert"},
    {"flora"},
    {"nnunet", "recipes"},
    {"report"},
    {"runs"},
    {"comparison"},
    {"flora_arguments"},
    {"flora_cli"},
    {"__main__"},
]
# What a room of the core may import besides the standard library, torch and our own; the rooms of the command are free.
FOREIGN: dict[str, set[str]] = {
    "errors": set(),
    "tucker": {"einops"},
    "storage": {"huggingface_hub", "safetensors", "tqdm", "transformers", "yaml"},
    "layers": {"regex", "transformers", "triton"},
    "tuner": {"numpy", "peft", "safetensors", "tqdm", "transformers"},
    "convert": {
        "diffusers",
        "safetensors",
        "tqdm",
        "transformers",
    },  # never peft: a format is key names and shapes
    "flora": set(),
}
DISTRIBUTIONS = {  # the name that is imported -> the name that is installed; tokenizers comes with transformers
    "sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow", "lycoris": "lycoris-lora",
    "tokenizers": "transformers",
}  # fmt: skip
FIELDS = {  # the first word of a module's name -> the extras it may import from, beside `recipes`
    "vision": "vision", "coco": "vision", "images": "vision", "text": "text", "multimodal": "text",
    "volume": "medical", "audio": "audio", "diffusion": "diffusion",
}  # fmt: skip
OPTIONAL = {  # imported where a model or a file asks for it, with a message if it is not there
    "flora.convert.base_model": {"diffusers"},
    "flora.comparison.rivals": {"lycoris-lora"},
    "flora.nnunet": {"nnunetv2"},  # imported by nnU-Net itself
    "flora.layers.gpu": {"triton"},  # comes with torch's builds for CUDA
    "flora.data.files": {"pillow"},
    "flora.data.hub": {"datasets"},
    "flora.data.results": {"pillow"},
    "flora.data.shown": {"pillow"},
    "flora.data.samples.signals": {"diffusers", "nibabel", "pillow", "soundfile"},
}
ODDS_AND_ENDS = {"utils", "util", "common", "helpers", "misc", "tools"}
LONGEST = 450  # lines that are not blank; the aim is 80 to 300, and a file that outgrows it is split by noun


def name_of(path: Path) -> str:
    """``src/flora/tuner/config.py`` -> ``flora.tuner.config``."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OUTSIDE = {"flora_arguments", "flora_cli"}  # of the package: help must not wait for PEFT
FILES = {name_of(path): path for path in [*sorted((SRC / PACKAGE).rglob("*.py")), *sorted(SRC.glob("*.py"))]}
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def room_of(module: str) -> str:
    """``flora.tuner.config`` -> ``tuner``; ``flora`` and ``flora_cli`` are rooms of their own."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that the tree imports, inside functions too; ``from a import b`` gives a.b if that is a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in FILES else module


def imports_of(module: str) -> set[str]:
    return set(imported(ast.parse(FILES[module].read_text(encoding="utf-8"))))


IMPORTS = {module: imports_of(module) for module in FILES}


def ours(module: str) -> bool:
    return module.partition(".")[0] in {PACKAGE, *OUTSIDE}


def test_every_file_is_checked() -> None:
    on_disk = [path for path in SRC.rglob("*.py") if ".egg-info" not in str(path)]
    assert len(FILES) == len(on_disk)
    assert len(FILES) > 10


def test_every_file_has_a_room() -> None:
    homeless = {module for module in FILES if room_of(module) not in LEVEL}
    assert not homeless, f"give these a level in {Path(__file__).name}: {sorted(homeless)}"


def test_imports_point_down() -> None:
    arrows = [
        (module, target)
        for module, targets in IMPORTS.items()
        for target in targets
        if ours(target) and room_of(module) != room_of(target)
    ]
    assert len(arrows) > 20
    unknown = [arrow for arrow in arrows if arrow[1] not in FILES]
    assert not unknown
    upward = [arrow for arrow in arrows if LEVEL[room_of(arrow[1])] >= LEVEL[room_of(arrow[0])]]
    assert not upward


def test_no_file_imports_itself_by_a_detour() -> None:
    graph = {module: {target for target in targets if target in FILES} for module, targets in IMPORTS.items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert set(order) == set(FILES)


def test_the_core_stays_light() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", PACKAGE}
    foreign = {
        (module, target)
        for module, targets in IMPORTS.items()
        for target in targets
        if room_of(module) in FOREIGN and target.partition(".")[0] not in allowed | FOREIGN[room_of(module)]
    }
    assert not foreign
    assert set(FOREIGN) | {"data"} == {room for rooms in LEVELS[: LEVEL["flora"] + 1] for room in rooms}


PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distributions(requirements: list[str]) -> set[str]:
    """``["torch>=2.6", "flora-peft[text]"]`` -> ``{"torch"}``."""
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
    return names - {PROJECT["name"]}


def test_every_package_that_is_imported_is_declared() -> None:
    """The core needs only ``dependencies``; rooms above it `recipes`; a recipe the extra of its field."""
    core = distributions(PROJECT["dependencies"])
    extras = {name: distributions(given) for name, given in PROJECT["optional-dependencies"].items()}
    undeclared = set()
    for module, targets in IMPORTS.items():
        declared = core | OPTIONAL.get(module, set())
        if room_of(module) not in FOREIGN:
            field = FIELDS.get(module.rpartition(".")[2].partition("_")[0], "recipes")
            declared = declared | extras["recipes"] | extras[field]
        packages = {target.partition(".")[0] for target in targets if not ours(target)} - set(sys.stdlib_module_names)
        undeclared |= {(module, name) for name in packages if DISTRIBUTIONS.get(name, name) not in declared}
    assert len(core) > 8
    assert not undeclared


def imported_with(modules: set[str]) -> set[str]:
    """All modules that importing these imports: what stands at the top of the files, followed through our own."""
    found: set[str] = set()
    while modules:
        module = modules.pop()
        found.add(module)
        if module in FILES:
            tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
            top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
            modules |= set(imported(ast.Module(top, []))) - found
    return found


def test_the_verbs_without_data_need_no_extra() -> None:
    """``pip install flora-peft`` is enough to plan, inspect, merge, convert and extract."""
    verbs = {
        "flora.convert.extraction.output", "flora.convert.extraction.finetune", "flora.report.anatomy",
        "flora.report.model_plan", "flora.runs.merging",
    }  # fmt: skip
    needed = {module.partition(".")[0] for module in imported_with(verbs) if not ours(module)}
    core = distributions(PROJECT["dependencies"])
    assert not {name for name in needed - set(sys.stdlib_module_names) if DISTRIBUTIONS.get(name, name) not in core}


def test_the_hints_of_missing_packages_are_the_extras() -> None:
    """Every extra but those for developers is in the table of hints, with what it brings."""
    declared = {
        name: distributions(given)
        for name, given in PROJECT["optional-dependencies"].items()
        if name not in {"all", "dev", "docs"}
    }
    hinted = {extra: {DISTRIBUTIONS.get(name, name) for name in modules} for extra, modules in EXTRAS.items()}
    assert hinted == declared
    assert set(missing.FIELDS.values()) <= set(declared)


def test_the_extra_all_has_every_field() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == set(EXTRAS) - {"recipes"}


def test_the_bounds_of_the_project_allow_what_make_installs() -> None:
    """``make`` holds some packages to one version, which must be one that ``pip install`` alone may take."""
    pinned = dict(
        line.split("==")
        for line in (Path(__file__).parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    required = {Requirement(text).name: Requirement(text) for texts in lists for text in texts}
    assert {"torch", "transformers"} <= set(pinned)
    for name, version in pinned.items():
        assert required[name].specifier.contains(version), name


def test_the_command_imports_nothing_before_it_knows_the_verb() -> None:
    """``import flora`` imports PEFT, which takes seconds; ``flora --help`` must not wait for that."""
    for name in OUTSIDE:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        at_the_top = ast.Module([node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        found = {module.partition(".")[0] for module in imported(at_the_top)}
        assert found <= set(sys.stdlib_module_names) | OUTSIDE


def test_no_file_for_odds_and_ends() -> None:
    assert not [module for module in FILES if module.rpartition(".")[2] in ODDS_AND_ENDS]


def test_no_file_bears_the_name_of_a_public_function() -> None:
    """``flora.plan`` is the function; a file plan.py would take its place once imported."""
    public = {*flora.__all__, "plan", "decompose", "load", "save", "extract"}
    files = {module.partition(".")[2] for module in FILES}
    assert not public & files
    assert len(public) >= 11


def test_no_file_outgrows_its_noun() -> None:
    lines = {
        module: sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())
        for module, path in FILES.items()
    }
    assert not {module: count for module, count in lines.items() if count > LONGEST}


def test_every_file_says_what_it_is() -> None:
    silent = [m for m, path in FILES.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent


def test_functions_have_air_and_few_conditional_expressions() -> None:
    """``python tests/readability.py`` prints the figures of every package."""
    whole = dict(densities())["all"]
    assert whole.blank >= 0.06 * whole.inside
    assert whole.conditional <= 0.02 * whole.code


def test_compute_code_is_explained_in_blocks() -> None:
    """Comments above an algorithm, not at the end of a line."""
    compute = compute_density()
    assert compute.code > 4000
    assert compute.comments >= 0.05 * compute.code
    assert compute.trailing <= 0.5 * compute.comments


def test_modules_of_the_first_version_keep_their_names() -> None:
    """Adapters and scripts of 0.1.0 name them."""
    merging, network, merge = map(import_module, ("flora.merging", "flora.volume_unet", "flora.convert.merge"))
    assert merging.merge is import_module("flora.runs.merging").merge
    assert network.VolumeUNet is import_module("flora.data.volume_unet").VolumeUNet
    assert merge.merge is import_module("flora.convert.streaming").stream_merged


def test_the_house_is_low() -> None:
    """A room stands on the floor above the highest room that it imports; ``__main__`` only starts the command."""
    below: dict[str, set[str]] = {room: set() for rooms in LEVELS for room in rooms}
    for module, targets in IMPORTS.items():
        below[room_of(module)] |= {room_of(target) for target in targets if ours(target)} - {room_of(module)}

    floors: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        floors[room] = 1 + max((floors[other] for other in below[room]), default=0)

    assert len(floors.keys() - {"__main__"}) <= 15
    assert max(floors.values()) <= 8
