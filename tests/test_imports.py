"""The shape of the house, a light import, and private names of other packages."""

import ast
import inspect
import subprocess
import sys
import warnings
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline, PixArtAlphaPipeline, StableDiffusion3Pipeline
from torch import nn

import elit
from elit import compat

SOURCE = Path(elit.__file__).parent
# A module may import from its own floor and from those before it.
FLOORS = (
    ("config", "budgets", "files", "compat", "_version", "pretrained"),
    ("models", "flow"),
    ("sampling", "costs"),
    ("training", "data", "released"),
    ("elastic",),
    ("evaluate", "planner"),
    ("serve", "play"),
    ("cli", "__main__"),
)
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES, MAX_TEST_LINES = 17_500, 13_000  # whatever is added
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(TREES[path]))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            names |= below or {node.module}
    return (names & NAMES) - {module_of(path)}


@pytest.mark.parametrize("path", [path for path in FILES if path != SOURCE / "__init__.py"], ids=module_of)
def test_no_import_points_up(path):
    own, others = module_of(path).split(".")[1], {name.partition(".")[2].split(".")[0] for name in imported(path)}
    assert not {room for room in others if not room or FLOOR_OF[room] > FLOOR_OF[own]}
    if own in ("models", "flow"):  # neighbours that know nothing of each other
        assert not others & {"models", "flow"} - {own}


def test_no_modules_import_each_other():
    graph = {module_of(path): imported(path) for path in FILES if path != SOURCE / "__init__.py"}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_private_names_of_other_packages_are_in_compat_alone():
    own = {"_getframe", "_asdict", "_exit"}  # Python's own
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    foreign = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                names = [] if node.attr in own else [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ("__future__", "elit"):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                names = [part for part in parts if part.startswith("_")]
            else:
                continue
            foreign += [f"{path.relative_to(SOURCE)}:{node.lineno}: {name}" for name in names]
    assert [line for line in foreign if not line.startswith("compat.py")] == []
    assert len(foreign) >= 8  # compat's own are seen, so others would be


def test_the_house_stays_small_and_typed():
    assert len(list(SOURCE.glob("*.py"))) <= 8
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "misc", "common"}
    assert not {path.stem for path in SOURCE.glob("*")} & set(elit.__all__)  # no module shadows a function
    for files, limit in ((FILES, MAX_LINES), (TESTS, MAX_TEST_LINES)):
        lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
        assert max(lines) <= 400
        assert sum(lines) <= limit
    untyped = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert sum(node.id == "Any" for node in untyped) <= 250


@pytest.mark.slow
def test_a_bare_import_is_light_and_every_public_name_is_there():
    code = "import sys; from elit.cli.main import main; main([]); assert main(['train', '--data', 'WRONG']) == 2; "
    code += "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(elit, name) for name in elit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = elit.nothing


def test_torch_warns_of_a_lone_process_in_these_words(tmp_path):
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match=compat.LONE_PROCESS):
        dcp.save({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "a", no_dist=False)
    with warnings.catch_warnings(), compat.lone_process():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", compat.LONE_PROCESS)
        dcp.load({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "a", no_dist=True)


def test_diffusers_registers_blocks_by_class():
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    made = type("FluxTransformerBlock", (FluxTransformerBlock,), {})
    compat.register_block_like(made, FluxTransformerBlock)
    known, like = TransformerBlockRegistry.get(made), TransformerBlockRegistry.get(FluxTransformerBlock)
    assert known.return_hidden_states_index == like.return_hidden_states_index
    compat.register_block_like(nn.Linear, nn.Linear)  # no block of diffusers: nothing to register


def test_diffusers_pipelines_have_the_names_that_are_read():
    """`elit.budget` asks the pipeline that calls a transformer; these are its own variables and properties."""
    assert isinstance(inspect.getattr_static(DiffusionPipeline, "_execution_device"), property)
    assert isinstance(inspect.getattr_static(StableDiffusion3Pipeline, "do_classifier_free_guidance"), property)
    for kind, names in (
        (DiTPipeline, {"self", "guidance_scale", "t"}),
        (PixArtAlphaPipeline, {"self", "do_classifier_free_guidance", "t"}),
        (StableDiffusion3Pipeline, {"t"}),
    ):
        assert names <= set(inspect.unwrap(kind.__call__).__code__.co_varnames)
