"""The commands of the guides, as they are written there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from elit.cli.main import main

ROOT = Path(__file__).parents[1]


def blocks(guide: str, language: str) -> str:
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))


def commands(guide: str) -> list[str]:
    return blocks(guide, "bash").replace("\\\n", " ").splitlines()


def test_the_commands_of_the_training_guide_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = commands("training.md")
    assert [line.split()[:2] for line in lines] == [
        ["python", "examples/small_data.py"],
        *(["elit", name] for name in ("encode", "encode", "train", "sample", "train", "train")),
    ]
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    subprocess.run([sys.executable, str(ROOT / lines[0].split()[1])], check=True)
    for line in lines[1:]:
        assert main(shlex.split(line)[1:]) == 0, line
    assert len(Path("runs/photos/metrics.jsonl").read_text().splitlines()) == 60
    assert Image.open("photos.png").size == (2 * 66 - 2, 2 * 66 - 2)
    assert Image.open("latents/inspect.png").size == (4 * 34 - 2, 4 * 34 - 2)


def test_the_commands_of_the_scores_guide_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = commands("evaluate.md")
    assert [line.split()[1] for line in lines] == ["train", *["evaluate"] * 4, "sweep", "inspect"]
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    exec(compile(blocks("evaluate.md", "python"), "evaluate.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[-4].startswith("16 ")
    assert said[-1].startswith("correlation ")
    assert (tmp_path / "runs/inside/report.html").is_file()
    assert len(list((tmp_path / "runs/scores/scores").glob("*.json"))) == 5
    assert len((tmp_path / "runs/sweep/sweep.jsonl").read_text().splitlines()) == 4 * 2 * 5
    assert (tmp_path / "runs/small/model/README.md").is_file()
