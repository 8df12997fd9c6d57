"""The commands of docs/training.md, as they are written there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from PIL import Image

from elit.cli.main import main

ROOT = Path(__file__).parents[1]


def test_the_commands_of_the_training_guide_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/training.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
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
