"""docs/elastify.md as it is written, with a tiny pipeline in the place of Qwen-Image."""

import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from tiny import pipeline, with_text
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import elit
from elit.cli.main import main

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs/elastify.md").read_text(encoding="utf-8")


def tiny_qwen_image(*_, **__):
    words = Tokenizer(models.WordLevel({"[pad]": 0, "[unk]": 1, "red": 2, "boat": 3}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    text = {"hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 4}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 20}
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    tiny = pipeline("QwenImagePipeline")
    made = diffusers.QwenImagePipeline(tiny.scheduler, tiny.vae, encoder, tokenizer, tiny.transformer)
    made.default_sample_size = 16
    made.set_progress_bar_config(disable=True)
    return made


TINY = "--steps 1 --batch-size 4 --teacher-steps 1 --preview-every 0 --lora-rank 1"


def commands():
    return [
        shlex.split(line)[1:]
        for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]


def test_the_guides_commands_and_python_run_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flux, qwen, own, _ = commands()
    Path("prompts.txt").write_text("red boat\nboat\n")
    Path("pictures/boat").mkdir(parents=True)
    for number, size in enumerate(((128, 64), (64, 128))):
        Image.new("RGB", size, "red").save(f"pictures/boat/{number}.png")
    made = {flux[1]: lambda: with_text("FluxPipeline"), qwen[1]: tiny_qwen_image}
    monkeypatch.setattr("elit.elastic.distill.load_pipeline", lambda config, device: made[config.pipeline]())
    for words in (flux, qwen):
        sizes = [word for word in words if re.fullmatch(r"\d+x\d+", word)]
        words = ["32x32" if word == sizes[0] else word for word in words if word not in sizes[1:]]
        assert main([*words, *shlex.split(TINY), "--precision", "fp32"]) == 0
        assert "elit.load_elastic" in (Path(words[2]) / "README.md").read_text()
    words = [{"1328x1328": "128x64", "1664x928": "64x128"}.get(word, word) for word in own]
    assert main([*words, *shlex.split(TINY), "--precision", "fp32"]) == 0
    assert len(list(Path("runs/qwen-own/cache").rglob("latents-*"))) == 2  # of two aspect ratios
    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_pretrained", tiny_qwen_image)
    told: dict = {}
    used, saved, by_diffusers = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    exec(used.replace('"num_inference_steps": 50', '"num_inference_steps": 1'), told)
    assert told["image"].size == (64, 64)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    exec(saved, told)
    assert told["again"].transformer.budgets == tuple(range(1, 65))
    exec(by_diffusers, told)
    assert told["pipe"].transformer.budgets == tuple(range(1, 65))


def test_the_command_for_own_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 6}
    elit.create_model("DiT-S/1", **sizes).save_pretrained("runs/digits/model")
    assert main([*" ".join(commands()[-1]).replace("--steps 100", "--steps 3").split(), "--batch-size", "4"]) == 0
    assert "distance to the original before" in capsys.readouterr().out
    model = elit.load_elastic("runs/elastic/model")
    drawn = elit.sample(model, [3], steps=2, budget=2, guidance=elit.CCFG(2.0, 1))
    assert drawn.isfinite().all()
