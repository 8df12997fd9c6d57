"""What is saved comes back bit for bit with elit; without it, the original does, or a message."""

import subprocess
import sys

import pytest
import torch
from tiny import KINDS, build, inputs, open_branches, window

import elit

pytestmark = pytest.mark.slow

# A process that cannot import elit: what each saved transformer gives, or what diffusers says of it.
STRANGER = """
import sys
sys.modules["elit"] = None
import diffusers, torch
for kind in sys.argv[2:]:
    for case in ("kept", "trained"):
        folder = f"{sys.argv[1]}/{kind}/{case}"
        try:
            model = getattr(diffusers, kind).from_pretrained(folder)
        except OSError as error:
            print(kind, case, error)
        else:
            with torch.no_grad():
                output = model(**torch.load(f"{folder}/call.pt"), return_dict=False)[0]
            torch.save(output, f"{folder}/output.pt")
"""


def elastic(kind):
    return open_branches(elit.elastify(build(kind), read_after=1, write_after=3, window=window(kind)))


def test_without_elit_it_is_the_original_or_a_message(tmp_path):
    for kind in KINDS:
        model, kept = elastic(kind), tmp_path / kind / "kept"
        model.save_pretrained(kept)
        torch.save(inputs(kind), kept / "call.pt")
        with torch.no_grad():
            next(p for p in model.parameters() if p.ndim == 2).mul_(1.01)
        model.save_pretrained(tmp_path / kind / "trained")
    words = [sys.executable, "-c", STRANGER, str(tmp_path), *KINDS]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    for kind, line in zip(KINDS, said, strict=True):
        assert line.startswith(f"{kind} trained")
        assert "no file named" in line
        with torch.no_grad():
            right = build(kind)(**inputs(kind), return_dict=False)[0]
        assert torch.allclose(torch.load(tmp_path / kind / "kept/output.pt"), right, atol=1e-5)
