"""Recipes by name, and the wheel that has them: built, installed beside nothing of this checkout, and run."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from elit.cli.main import main
from elit.config import recipes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_recipes_are_listed_and_go_by_name(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["config"] for row in rows} == {f"recipe:{name}" for name in recipes()}
    assert "recipe:imagenet-256/elit-dit-xl" in {row["config"] for row in rows}
    assert all(row["about"] and row["steps"] > 0 for row in rows)
    assert len(recipes()) == len(list((ROOT / "recipes").glob("*/*.yaml")))
    assert main(["train", "--config", "recipe:imagenet-256/elit-dit-xl", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tflops"] == pytest.approx(188, rel=0.02)


def test_the_wheel_has_all_it_needs(tmp_path):
    """By a Python that finds the wheel of this checkout and the tests' own packages, but nothing of the checkout."""
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    shutil.rmtree(source)
    here = {path.relative_to(ROOT / "src") for path in (ROOT / "src/elit").rglob("*.*") if path.suffix != ".pyc"}
    assert here <= {path.relative_to(site) for path in (site / "elit").rglob("*.*")}
    names = {str(path.relative_to(site / "elit/recipes").with_suffix("")) for path in site.rglob("recipes/*/*.yaml")}
    assert names == set(recipes())
    code = f"import sys; sys.path += {[str(site), sysconfig.get_path('purelib')]}; import elit; "
    code += "from elit.cli.main import main; [getattr(elit, name) for name in elit.__all__]; "
    code += "print(elit.__file__); main('sample fashion --labels bag --steps 1 --out bag.png'.split())"
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    line = [sys.executable, "-I", "-S", "-c", code]  # -S reads no .pth file, which would lead back to this checkout
    out = subprocess.run(line, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(out.splitlines()[0]).parent == site / "elit"
    assert (tmp_path / "bag.png").is_file()  # by the model in the box
