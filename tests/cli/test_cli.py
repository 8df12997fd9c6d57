"""Commands as users type them: help, results, and one line for bad input."""

import json
import re

import pytest

import elit
from elit.cli.main import COMMANDS, FIRST, main

pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(capsys, name):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in (f"Example: elit {name}", "--json", "default"))


def test_a_name_that_is_no_command_has_a_hint(run):
    assert all(name in run(*words)[1] for name in COMMANDS for words in ([], ["--help"]))
    assert re.findall(r"^  (\S+)  ", run()[1], flags=re.MULTILINE) == list(FIRST)
    code, out, err = run("SMAPLE")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("elit: unknown command 'SMAPLE'; did you mean 'sample'? commands: quickstart, ")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("train --model DiT-S/2", "--model.name"),
        ("train --lr 1e-3", "--learning-rate"),
        ("train --epochs 3", "--steps"),
        ("train --depth 3", "--model.depth"),
        ("train --bath-size 3", "--batch-size"),
        ("distill a b --lr 1", "--learning-rate"),
        ("sample fashion --guidance-scale 2", "--scale"),
        ("sample fashion --label 2", "--labels"),
    ],
)
def test_an_option_that_is_none_has_a_hint(run, line, meant):
    code, out, err = run(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"did you mean {meant}? (see elit {line.split()[0]} --help)" in err


def test_a_shell_completes_all_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tyro-print-completion", "bash"])
    assert stop.value.code in (0, None)
    script = capsys.readouterr().out
    assert "complete -F _tyro_elit elit" in script
    assert all(name in script for name in (*COMMANDS, "--guidance-interval", "--model.num-heads"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample nothing", "'nothing'"),
        ("sample MODEL --budget 17", "budget must be a number of latents per window (1 to 16)"),
        ("sample MODEL --step-budgets 8 4 --budget 8", "step_budgets"),
        ("sample MODEL --guidance ccfg --guidance-budget 99", "got 99"),
        ("sample MODEL --guidance cfg --scale inf", "scale must be"),
        ("sample MODEL --scale 2", "scale"),
        ("sample MODEL --text-encoder t5", "text_encoder"),
        ("sample MODEL --out x.bmp", "'x.bmp'"),
        ("sample MODEL --device nowhere", "device must be usable on this machine, got 'nowhere'"),
        ("sample MODEL --target-ms 100 --target-gflops 1", "target_ms, target_gflops given; give one of"),
        ("sample MODEL --target-ms 100 --steps 8", "cannot use steps with a target"),
        ("sample MODEL --wrong 1", "--wrong"),
        (f"sample fashion --out {'x' * 300}/a.png", "File name too long"),
        ("flops ELIT-HDiT-S/2 --budgets 6", "(4 to 16 in steps of 4)"),
        ("train --config recipe:imagenet-256/elit-dit-xxl", "config must be a recipe that elit recipes lists"),
        ("train --model.sample-size 9 --dry-run", "sample_size"),
        ("distill nothing out --prompts nothing.txt", "nothing"),
        ("encode nowhere out --vae a/v", "'nowhere'"),
        ("import nothing.pt out", "nothing.pt"),
        ("evaluate", "Missing"),
        ("evaluate MODEL --detector fid", "'fid'"),
        ("sweep nothing", "'nothing'"),
        ("inspect PLAIN --data digits", "Read"),
        ("inspect TEXT", "samples"),
        ("inspect FEW --data digits", "y must be labels 0 to "),
    ],
)
@pytest.mark.usefixtures("digit_classifiers")
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, models, line, message):
    words = [str(models / word.lower()) if word.isupper() else word for word in line.split()]
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"elit {words[0]}: ")
    assert message in err
    assert len(err) < 700
    assert not list(tmp_path.iterdir())


def test_flops_of_presets_and_of_saved_models(run, models):
    code, out, _ = run("flops", "DiT-XL/2", "ELIT-DiT-XL/2", "--sample-size", "64", "--json")
    rows = {(row["model"], row["budget"]): row for row in json.loads(out.splitlines()[-1])}
    assert code == 0
    assert rows["DiT-XL/2", None]["training_tflops"] == pytest.approx(806, rel=0.015)
    assert rows["ELIT-DiT-XL/2", 1.0]["training_tflops"] == pytest.approx(831, rel=0.015)
    assert rows["ELIT-DiT-XL/2", 0.25]["tokens_per_group"] == 16
    assert run("flops", models / "model")[0] == 0
    rows = json.loads(run("flops", "--paper", "--json")[1].splitlines()[-1])
    assert "ELIT-U-ViT-XL/2 MB, 512px, training TFLOPs" in {row["row"] for row in rows}
    assert all(abs(row["difference"]) <= 0.025 for row in rows)


def test_train_from_options_and_from_a_file(run):
    model = "--model.hidden-size 16 --model.num-heads 1 --model.depth 3 --model.window 4 4 --model.split 1 1 1"
    short = "--steps 3 --batch-size 4 --preview-every 0"
    code, out, _ = run(*f"train --model.name ELIT-DiT-S/1 {model} {short} --out a --json".split())
    assert (code, json.loads(out.splitlines()[-1])) == (0, {"model": "a/model", "steps": 3})
    assert run("train", "--config", "a/config.yaml", "--out", "b", "--steps", "2")[0] == 0
    assert elit.load_model("b/model").spec.split == (1, 1, 1)
    code, _, error = run("train", "--config", "a/config.yaml")
    assert (code, "holds a run at step 3" in error) == (2, True)


def test_doctor(run, tmp_path, monkeypatch):
    findings = json.loads(run("doctor", "--json")[1].splitlines()[-1])
    assert findings["versions"]["torch"]
    assert "cores" in findings["devices"]["cpu"]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run("doctor")
    assert (code, "operator nms does not exist" in out, "pip uninstall torchvision" in out) == (0, True, True)
