"""What a command loads before it answers: no more than it needs, so that a typing error costs no seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import opened

from elit.cli.checks import PICTURES
from elit.cli.main import COMMANDS, main
from elit.sampling.pictures import FORMATS

pytestmark = pytest.mark.slow

HEAVY = (
    *("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "pandas", "pyarrow", "numpy", "scipy"),
    *("sklearn", "matplotlib", "PIL", "safetensors", "huggingface_hub", "ray", "fastapi", "gradio"),
)
MODULE = "import json, sys\nfrom elit.cli.main import main\n"
LOADED = f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


def loaded_by(*lines: str) -> list[str]:
    """Which of `HEAVY` one fresh process has loaded after `lines`; what they print goes to stderr."""
    body = "\n".join(
        ["import contextlib", "with contextlib.redirect_stdout(sys.stderr):", *(f"    {x}" for x in lines)]
    )
    done = subprocess.run([sys.executable, "-c", MODULE + body + "\n" + LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# Per command: arguments that cannot be right, and what is said.
REFUSALS = {
    "quickstart": (["--steps", "0"], "steps=0: give at least 1"),
    "encode": (["nowhere", "out", "--vae", "a/v"], "src='nowhere': no such file or folder"),
    "train": (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
    "sample": (["nowhere"], "model='nowhere': no such folder"),
    "evaluate": (["nowhere"], "pictures='nowhere': no such file or folder"),
    "sweep": (["nowhere"], "model='nowhere': no such folder"),
    "profile": (["nowhere"], "model='nowhere': no such folder"),
    "inspect": (["nowhere"], "model='nowhere': no such folder"),
    "flops": (["--budgets", "many"], "got 'many'"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("startup") / "model"
    opened("elit-dit").save_pretrained(folder)
    return folder


def test_no_command_loads_torch_to_say_what_is_wrong_or_to_do_arithmetic(saved):
    """All commands in one process: each module, a refusal of each, and the costs of networks by name."""
    lines = [f"main([{name!r}, *{arguments!r}])" for name, (arguments, _) in REFUSALS.items()]
    lines += [f"main({['sample', str(saved), *arguments]!r})" for arguments, _ in BAD_SAMPLES]
    lines += [f"main({arguments!r})" for arguments, _ in BAD_MODELS]
    lines += ["main(['flops', 'DiT-S/2', 'ELIT-HDiT-S/2', '--json'])", "main(['flops', '--paper'])"]
    modules = [name.replace("-", "_").replace("import", "import_") for name in COMMANDS]
    lines += [f"__import__('elit.cli.{name}')" for name in modules]
    assert loaded_by(*lines) == []


@pytest.mark.parametrize("name", REFUSALS)
def test_every_command_refuses_by_its_arguments(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSALS[name]
    assert main([name, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


BAD_SAMPLES = [
    (["--budget", "many"], "got 'many'"),
    (["--budget", "50%@0-0.5"], "budget must cover t from 0 to 1"),
    (["--guidance", "ccfg", "--guidance-budget", "0"], "got 0"),
    (["--scale", "-1"], "scale=-1: give a number >= 0"),
    (["--guidance-interval", "0.7", "0.3"], "guidance_interval=0.7 0.3: need 0 <= low <= high <= 1"),
    (["--steps", "0"], "steps=0: give at least 1"),
    (["--count", "0"], "count=0: give at least 1"),
    (["--batch-size", "0"], "batch_size=0: give at least 1"),
    (["--shift", "0"], "shift=0: give a number above 0"),
    (["--cache", "-1"], "cache=-1: give a threshold >= 0"),
    (["--target-ms", "0"], "target_ms=0: give a number above 0"),
    (["--out", "x.bmp"], "out='x.bmp': give a .png, .jpg"),
    (["--vae", "nowhere"], "vae='nowhere': no such folder"),
]


# Names and sizes of networks, refused by arithmetic.
BAD_MODELS = [
    (["flops", "DiT-S/3"], "unknown model 'DiT-S/3'; close names: DiT-S/"),
    (["flops", "ELIT-SiT-S/2", "--sample-size", "30"], "nearest valid"),
    (["train", "--model.name", "DiT-Q/2", "--dry-run"], "unknown model 'DiT-Q/2'"),
    (["train", "--model.sample-size", "8", "--model.num-heads", "5", "--dry-run"], "num_heads=5: need an even"),
    (["train", "--model.sample-size", "9", "--dry-run"], "sample_size=(9, 9): patches of 2×2 need multiples of 2×2"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_MODELS)
def test_bad_networks_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), BAD_SAMPLES)
def test_bad_options_of_sample_are_one_line(saved, arguments, message, capsys):
    assert main(["sample", str(saved), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_what_was_taken_or_refused_without_a_name(saved, tmp_path, capsys):
    """A share above 1, a configuration that is no text, an autoencoder that is nowhere, a place that is a file."""
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "file").write_text("")
    for line, message in {
        f"train --config {tmp_path}/binary.yaml": f"config='{tmp_path}/binary.yaml': not YAML: ",
        f"encode {tmp_path} {tmp_path}/out --vae nowhere": "vae='nowhere': no such folder, and no name on the hub",
        f"sample {saved} --out {tmp_path}/file/x.png": f"cannot write out='{tmp_path}/file/x.png': ",
    }.items():
        assert main(line.split()) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_the_names_of_pictures_are_those_that_are_written():
    assert set(FORMATS) == set(PICTURES)


def test_samples_and_doctor_load_what_they_need(saved, tmp_path):
    """Beside torch and diffusers' models: of what those load themselves nothing is asked. A replica is no slower."""
    base = {"torch", "diffusers", "numpy", "transformers", "accelerate", "PIL", "safetensors", "huggingface_hub"}
    drawing = f"main({['sample', str(saved), '--steps', '1', '--out', str(tmp_path / 'x.npz')]!r})"
    assert not set(loaded_by(drawing, "import elit.serve.replica")) - base
    assert (tmp_path / "x.npz").is_file()
    listed = loaded_by("main(['doctor', '--json'])")
    assert not set(listed) - {"torch", "numpy"}
