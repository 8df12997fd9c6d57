"""docs/elastify.md as it is written, with a tiny pipeline in the place of Qwen-Image."""

import re
import shlex
from pathlib import Path

import diffusers
import pytest
import torch
from tiny import pipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import elit
from elit.cli.main import main

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs/elastify.md").read_text(encoding="utf-8")


def tiny_qwen_image(*_, **__):
    """With a text encoder and a tokenizer of four words."""
    words = Tokenizer(models.WordLevel({"[pad]": 0, "[unk]": 1, "red": 2, "boat": 3}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]")
    text = {
        **{"hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "vocab_size": 4},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 20}
    torch.manual_seed(0)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    tiny = pipeline("QwenImagePipeline")
    made = diffusers.QwenImagePipeline(tiny.scheduler, tiny.vae, encoder, tokenizer, deeper(tiny.transformer))
    made.default_sample_size = 16
    made.set_progress_bar_config(disable=True)
    return made


def deeper(transformer):
    """60 blocks, as many as the guide's: the same few over and over would not do, each has its role."""
    return type(transformer).from_config({**transformer.config, "num_layers": 60}).eval()


def test_the_guides_python_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_pretrained", tiny_qwen_image)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 2
    told: dict = {}
    for block in blocks[:1]:
        exec(block.replace('"num_inference_steps": 50', '"num_inference_steps": 1'), told)
    assert told["image"].size == (64, 64)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for block in blocks[1:]:
        exec(block, told)
    assert told["again"].transformer.budgets == tuple(range(1, 65))


def test_the_command_trains_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 24, "num_heads": 2, "depth": 6}
    elit.create_model("DiT-S/1", **sizes).save_pretrained("runs/digits/model")
    (line,) = re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
    words = [*shlex.split(line.replace("--steps 100", "--steps 3"))[1:], "--samples", "10"]
    assert main(words) == 0
    assert "latents a window" in capsys.readouterr().out
    model = elit.load_elastic("runs/elastic")
    assert model.budgets == tuple(range(1, 17))
    drawn = elit.sample(model, [3], steps=2, budget=2, guidance=elit.CCFG(2.0, 1))
    assert drawn.isfinite().all()
    with pytest.raises(OSError, match="no file named"):  # all weights were trained: none of them loads alone
        elit.load_model("runs/elastic")
    assert main(["elastify", "runs/digits/model"]) == 2
    assert "out: not given" in capsys.readouterr().err
