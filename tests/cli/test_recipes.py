"""Recipes by name, and the wheel that has them: built, installed beside nothing of this checkout, and run."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import matplotlib
import pytest

import elit
from elit.cli.main import main
from elit.config import load_config, recipes

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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Python of an environment that has the wheel of this checkout, and the tests' own packages but for it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    # Of a path in a .pth file Python reads no further .pth, so that nothing leads back to this checkout.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(source)
    return folder / "env" / "bin" / "python", site


def python(installed, *arguments, cwd):
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HOME": str(cwd)}
    environment["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # its list of fonts takes seconds to make
    done = subprocess.run([installed[0], *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_all_it_needs(installed, tmp_path):
    site = installed[1]
    here = {path.relative_to(ROOT / "src") for path in (ROOT / "src/elit").rglob("*.py")}
    assert here <= {path.relative_to(site) for path in (site / "elit").rglob("*.py")}
    names = {str(path.relative_to(site / "elit/recipes").with_suffix("")) for path in site.rglob("recipes/*/*.yaml")}
    assert names == set(recipes())
    assert (site / "elit/py.typed").is_file()
    assert python(installed, "-m", "elit", "--version", cwd=tmp_path) == f"elit {elit.__version__}\n"
    where = python(installed, "-c", "import elit; print(elit.__file__)", cwd=tmp_path)
    assert Path(where.strip()).parent == site / "elit"
    assert "recipe:imagenet-512/elit-dit-xl" in python(installed, "-m", "elit", "recipes", cwd=tmp_path)


@pytest.mark.slow
def test_every_public_name_is_there_and_a_quickstart_runs_from_the_wheel(installed, tmp_path):
    small = (
        "import elit.cli.quickstart, functools; [getattr(elit, n) for n in elit.__all__]; q = elit.cli.quickstart; "
        "q.train_digit_classifier = functools.partial(q.train_digit_classifier, epochs=1); q.SAMPLES = 20; "
        "q.SAMPLING_STEPS = 2; raise SystemExit(elit.cli.main.main(['quickstart', '--steps', '2']))"
    )
    python(installed, "-c", small, cwd=tmp_path)
    assert (tmp_path / "runs/quickstart/report.html").is_file()
    assert load_config(tmp_path / "runs/quickstart/config.yaml").out == "runs/quickstart"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["quickstart"]
