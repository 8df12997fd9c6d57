"""The commands of the guides, as they are written there."""

import glob
import json
import re
import runpy
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import small_vae
from PIL import Image
from released_files import ELIT, checkpoint, weights
from serve.service import saved_model, served

import elit
from elit.cli.main import main, parse

pytestmark = pytest.mark.usefixtures("digit_classifiers")

ROOT = Path(__file__).parents[1]


def blocks(guide: str, language: str) -> str:
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))


def commands(guide: str) -> list[str]:
    return blocks(guide, "bash").replace("\\\n", " ").splitlines()


def run(guide: str, less: dict[str, str]) -> None:
    for line in commands(guide):
        words = [word for part, options in less.items() if part in line for word in options.split()]
        assert not line.startswith("elit ") or main([*shlex.split(line)[1:], *words]) == 0, line


def test_the_site_has_every_page_and_every_public_name():
    """`make docs` itself is strict about links; it needs the extra `docs`."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    kinds = {kind: pages for entry in site["nav"] for kind, pages in entry.items()}
    assert list(kinds) == ["Learn", "Do", "Reference", "Explanation"]
    pages = {page for pages in kinds.values() for entry in pages for page in entry.values()}
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")}
    api = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: elit\.(\w+)$", api, flags=re.MULTILINE)) == sorted(elit.__all__)


@pytest.mark.slow
def test_the_commands_of_the_training_guide_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands("training.md")[0] == "python examples/small_data.py"
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    runpy.run_path(str(ROOT / "examples/small_data.py"))["main"](16)  # fewer pictures than by default
    run("training.md", {"--data latents": "--batch-size 4", "elit sample": "--steps 2"})
    assert len(Path("runs/photos/metrics.jsonl").read_text().splitlines()) == 60
    assert Image.open("photos.png").size == (2 * 66 - 2, 2 * 66 - 2)
    assert Image.open("latents/inspect.png").size == (4 * 34 - 2, 4 * 34 - 2)


@pytest.mark.slow
def test_the_commands_of_the_scores_guide_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep = "--count 8 --chunk 8 --scales 1.5 --steps 2 --budgets 100% 1"
    less = {"elit train": "--steps 2 --batch-size 4", "elit evaluate runs/small": "--count 8 --steps 1"}
    run("evaluate.md", less | {"elit sweep": sweep, "elit inspect": "--steps 1 --count 4"})
    python = blocks("evaluate.md", "python").replace("count=100", "count=8")
    exec(compile(python, "evaluate.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert [said[-4][:3], said[-1][:12]] == ["16 ", "correlation "]
    assert (tmp_path / "runs/inside/inspect.json").is_file()
    assert len(list((tmp_path / "runs/scores/scores").glob("*.json"))) == 5
    assert len((tmp_path / "runs/sweep/sweep.jsonl").read_text().splitlines()) == 3 * 3
    assert (tmp_path / "runs/small/model/README.md").is_file()


@pytest.mark.slow
def test_the_guide_to_planning_runs_as_written(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("elit.planner.profile.MIN_ROUNDS", 1)
    shutil.copytree(models / "model", tmp_path / "runs/quickstart/model")
    sweep = "--count 8 --chunk 8 --steps 2 --scales 1.5 --budgets 100% 1"
    run("inference.md", {"elit profile": "--seconds 0", "elit sweep": sweep})
    exec(compile(blocks("inference.md", "python"), "inference.md", "exec"), {})
    assert "sweep.jsonl" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "planned.png").is_file()


@pytest.mark.slow
def test_the_commands_of_the_serving_guide_run_as_written(tmp_path, monkeypatch, capsys):
    from elit.cli import serve

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("elit.planner.profile.MIN_ROUNDS", 1)
    model = saved_model(tmp_path / "runs/quickstart/model")
    lines = commands("serving.md")
    assert lines[0].split("#")[0].strip() == "pip install '.[serve]'"
    args = parse(serve.Args, "serve", shlex.split(lines[1], comments=True)[2:])
    service = serve.settings(args, "cpu", needs_key=False)
    assert (str(service.model), service.deadline_ms) == ("fashion", 2000)
    less = {"loadtest": ["--seconds", "1"], "profile": ["--seconds", "0"], "serve": []}
    with served(replace(service, model=str(model), rungs=(), deadline_ms=60_000, name="fashion")) as (url, _, _):
        for line in lines[2:]:
            here = line.replace("http://127.0.0.1:8000", url)
            if line.startswith("curl "):
                # The stand-in's class has the number of the model's own.
                asked = shlex.split(here.replace("ankle boot", "9"))
                answer = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
                assert answer["data"][0]["b64_json"]
                continue
            words = shlex.split(here, comments=True)[1:]
            words = [match for word in words for match in (glob.glob(word) if "*" in word else [word])]
            assert main([*words, *less[words[0]]]) == 0, line
        exec(compile(blocks("serving.md", "python").replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    assert "'budget': 4" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_the_guide_to_published_checkpoints_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ELIT | {"width": 384, "heads": 6, "classes": 1000}
    files = {
        "elit_sit_mb_imagenet_256px_1k_2000000.pt": checkpoint(sizes, model="ELIT-SiT-S/2"),
        "SiT-XL-2-256.pt": weights(sizes, elit=False, double=True),
        "DiT-XL-2-256x256.pt": weights(sizes, elit=False, double=True),
    }
    for name, content in files.items():
        torch.save(content, name)
    small_vae(scaling_factor=0.18215).save_pretrained("sd-vae")
    run("released.md", {"elit sample": "--steps 3"})
    names: dict = {}
    exec(blocks("released.md", "python"), names)
    assert names["latents"].shape == (2, 4, 16, 16)
    assert names["image"].size == (32, 32)
    assert all(Image.open(name).size for name in ("dogs.png", "heun.png", "dit.png"))


@pytest.mark.parametrize("name", ["own_transformer", "train_loop", "pipeline_dial"])
def test_an_example_and_its_notebook_run(tmp_path, monkeypatch, capsys, name):
    """The notebook is made of the example; its cells run here with two steps and few held-out digits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    made = runpy.run_path(str(ROOT / "examples/notebooks.py"))
    cells = json.loads((ROOT / f"examples/{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "OWNER" not in cells[0]["source"]  # a badge is for a copy that has an address
    assert [cell["source"] for cell in code] == made["code_cells"](name)
    assert all("image/png" in cell["outputs"][-1]["data"] for cell in code[2:])
    names: dict = {}
    less = [re.sub(r"\bsteps( ?= ?)\d+", r"steps\g<1>2", cell["source"]).replace("1500:", "1780:") for cell in code]
    drawn = [made["run"](cell, names) for cell in less]
    said = [line.split(":")[0].strip() for line in drawn[1][0]["text"].splitlines()]
    budgets = [f"{number} latents" for number in (16, 8, 4, 1)]
    shares = ["100%", "50%", "25%"]
    assert said == {"own_transformer": ["plain", *budgets], "train_loop": budgets, "pipeline_dial": shares}[name]
    assert all("image/png" in outputs[-1]["data"] for outputs in drawn[2:])
    length = len((ROOT / f"examples/{name}.py").read_text(encoding="utf-8").splitlines())
    assert length <= (50 if name == "train_loop" else 60)
