"""The quickstart in full, once: its results, its files, and the README's commands on what it leaves."""

import html
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from elit.cli.main import main
from elit.quickstart import PRODUCTS, RECIPES, quickstart

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which `elit quickstart` has run."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["quickstart"]) == 0
    return folder


def test_results(workplace):
    results = json.loads((workplace / "runs/quickstart/results.json").read_text())
    rows = {(row["tokens_per_group"], row["guidance"]): row for row in results["rows"]}
    full, full_ccfg = rows[16, "none"], rows[16, "ccfg"]
    assert len({row["budget"] for row in results["rows"]}) >= 5
    assert full["budget"] == 1.0
    assert full["accuracy"] >= 0.90
    assert full_ccfg["accuracy"] >= 0.97
    for guidance in ("none", "ccfg"):
        costs = [row["gflops_per_image"] for row in results["rows"] if row["guidance"] == guidance]
        assert costs == sorted(set(costs), reverse=True)
    keys = ["budget", "tokens_per_group", "guidance", "gflops_per_image", "ms_per_image", "fd", "accuracy"]
    assert all(list(row) == keys for row in results["rows"])


def test_files(workplace):
    out = workplace / "runs/quickstart"
    assert {path.name for path in out.iterdir()} == set(PRODUCTS) - {"samples", "samples.gif"}
    for name in ("samples.png", "compute_quality.png", "read_attention.png"):
        assert min(Image.open(out / name).size) > 300


def test_the_report_is_self_contained(workplace):
    page = (workplace / "runs/quickstart/report.html").read_text()
    links = links_of(page)
    assert len(links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert 'name="viewport"' in page


def links_of(page: str) -> list[str]:
    links: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(value for key, value in attributes if key in ("src", "href"))

    Links().feed(page)
    return links


@pytest.mark.parametrize("backbone", [name for name in RECIPES if name != "dit"])
def test_every_backbone_goes_all_the_way(backbone, tmp_path, monkeypatch):
    """A few steps of training: what comes out is no digit yet, but every file is there and every advice works."""
    monkeypatch.setitem(RECIPES, backbone, replace(RECIPES[backbone], samples=20))
    monkeypatch.setattr("elit.quickstart.SAMPLING_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    result = quickstart("run", backbone=backbone, steps=3, say=lambda line: None)
    clips = backbone == "video"
    written = {path.name for path in Path("run").iterdir()}
    assert written == set(PRODUCTS) - {"samples"} - (set() if clips else {"samples.gif"})
    assert json.loads(Path("run/results.json").read_text())["backbone"] == backbone
    assert [row.tokens_per_group for row in result.scores[::2]] == list(RECIPES[backbone].budgets)
    assert all((row.steady is not None) == clips for row in result.scores)
    page = Path("run/report.html").read_text()
    assert [link.split(";")[0] for link in links_of(page)].count("data:image/gif") == clips
    if clips:
        with Image.open("run/samples.gif") as animation:
            assert animation.n_frames == 4
    code = html.unescape(re.search(r"<pre><code>(.*?)</code>", page, flags=re.DOTALL)[1])
    sampling, training = code.splitlines()
    assert main(shlex.split(sampling)[1:]) == 0
    assert Path("clips.gif" if clips else "digits.png").is_file()
    assert main([*shlex.split(training)[1:], "--steps", "1"]) == 0


def test_an_unknown_backbone_is_named(tmp_path):
    with pytest.raises(ValueError, match="backbone='sit': give one of dit, uvit, hdit, mmdit, video"):
        quickstart(tmp_path / "run", backbone="sit")
    assert not (tmp_path / "run").exists()


def readme_commands() -> list[str]:
    """The `elit` lines of the README's shell blocks, but for the quickstart itself, which has run."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("elit ") and line.split()[1] != "quickstart"]


def test_the_readmes_commands_run_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    commands = readme_commands()
    assert {line.split()[1] for line in commands} == {"train", "sample", "flops", "doctor"}
    for line in commands:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line


def test_the_readmes_python_runs_as_written(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(block, names)


def test_the_same_seed_gives_the_same_numbers_and_another_run_clears_only_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "dit", replace(RECIPES["dit"], samples=20))
    monkeypatch.setattr("elit.quickstart.SAMPLING_STEPS", 2)

    def numbers(seed):
        result = quickstart(tmp_path / "run", steps=3, seed=seed, say=lambda line: None).results()
        return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in result["rows"]]

    first = numbers(0)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert numbers(0) == first
    assert numbers(1) != first
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
