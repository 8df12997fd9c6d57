"""Text encoders of the Hugging Face kinds, made small with random weights, and what is kept of their work."""

import json
import sys

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data._utils.pin_memory import pin_memory

import elit
from elit.models.text import TextEncoder, embed_prompts, encode_prompts

WORDS = ("<pad>", "<eos>", "<unk>", "a", "red", "blue", "boat", "on", "the", "sea")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PROMPTS = ["a red boat", "a blue boat on the sea", "a boat"]


def save_encoder(kind: str, folder) -> str:
    """A tiny encoder of one kind with a tokenizer of ten words."""
    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SMALL, **common, max_position_embeddings=16))
    elif kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **common))
    elif kind == "clip":
        text = SMALL | common | {"max_position_embeddings": 16}
        vision = SMALL | {"image_size": 8, "patch_size": 4}
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    else:
        sizes = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 16}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **common))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    pad = {} if kind == "llama" else {"pad_token": "<pad>"}  # language models often have none
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", model_max_length=16, **pad
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "llama"])
def test_any_kind_of_encoder(kind, tmp_path):
    """One vector a token, padding marked, and a prompt's numbers do not depend on its company."""
    encoder = TextEncoder(save_encoder(kind, tmp_path / kind), length=8)
    text = encoder(PROMPTS)
    assert text.embeddings.shape == (3, 6, 16)
    assert text.mask.sum(1).tolist() == [3, 6, 2]
    assert (text.pooled is not None) == (kind in ("bert", "clip"))
    alone = encoder(PROMPTS[2:])
    assert torch.allclose(alone.embeddings, text.embeddings[2:, :2], atol=1e-5)
    parts = encoder(PROMPTS, batch_size=1)
    assert torch.equal(parts.mask, text.mask)
    assert torch.allclose(parts.embeddings, text.embeddings, atol=1e-5)
    assert not text.embeddings[~text.mask].any()
    assert encoder(["a red boat on the blue blue blue blue blue sea"]).embeddings.shape[1] == 8  # cut
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    if kind == "clip":  # its text half alone
        assert isinstance(encoder.model, transformers.CLIPTextModel)
        tokens = encoder.tokenizer(PROMPTS, padding=True, return_tensors="pt")
        whole = transformers.CLIPModel.from_pretrained(tmp_path / kind).eval().text_model
        with torch.no_grad():
            expected = whole(tokens.input_ids, tokens.attention_mask).last_hidden_state
        assert torch.allclose(text.embeddings[text.mask], expected[text.mask], atol=1e-5)


def test_a_pipelines_tokenizer_that_pads_on_the_left_gives_the_same(tmp_path):
    """The columns of the tokens, not of the padding; the tokenizer itself stays as it is."""
    encoder = TextEncoder(save_encoder("llama", tmp_path / "llama"), length=8)
    encoder.tokenizer.padding_side = "left"
    text = embed_prompts(PROMPTS, encoder.tokenizer, encoder.model, length=8)
    assert encoder.tokenizer.padding_side == "left"
    encoder.tokenizer.padding_side = "right"
    right = encoder(PROMPTS)
    assert torch.equal(text.mask, right.mask)
    assert torch.allclose(text.embeddings, right.embeddings, atol=1e-6)


def test_prompts_are_encoded_once_and_kept(tmp_path, monkeypatch):
    folder = save_encoder("bert", tmp_path / "bert")
    cache = tmp_path / "images" / ".text"
    first = encode_prompts(PROMPTS, folder, length=8, cache=cache)
    assert len(list(cache.iterdir())) == 1
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # a damaged one is made again
    encode_prompts(PROMPTS, folder, length=8, cache=cache)
    monkeypatch.setattr("elit.models.text.TextEncoder", None)  # a second reading loads no encoder
    again = encode_prompts(PROMPTS, folder, length=8, cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    for change in ({"length": 7}, {"prompts": PROMPTS[:2]}):
        with pytest.raises(TypeError):  # another length or other prompts are encoded anew
            encode_prompts(**{"prompts": PROMPTS, "encoder": folder, "length": 8, "cache": cache} | change)


def test_what_cannot_be_encoded_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot load text_encoder='.*': "):
        TextEncoder(str(tmp_path / "nothing"), length=8)
    with pytest.raises(ValueError, match=r"text_length must be at most 16 for .*, got 99"):
        TextEncoder(save_encoder("bert", tmp_path / "encoder"), length=99)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"without transformers: pip install 'elit-diffusion\[text\]'"):
        TextEncoder("t5", length=8)


def test_a_loader_pins_all_of_a_text(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda part: pinned.append(part) or part)
    text = elit.Text(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    batch = pin_memory((torch.zeros(1), text))
    assert len(pinned) == 3
    assert torch.equal(batch[1].embeddings, text.embeddings)


@pytest.fixture
def captioned(tmp_path):
    """A folder of images with captions beside them."""
    root = tmp_path / "images"
    lines = []
    for i in range(6):
        path = root / ("red" if i % 2 else "blue") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (10, 10), (250, 0, 0) if i % 2 else (0, 0, 250)).save(path)
        lines.append({"file_name": str(path.relative_to(root)), "text": PROMPTS[i % 2]})
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def test_a_folder_with_captions_trains_and_samples(tmp_path, captioned, capsys):
    """The whole way of a user: an encoder by folder, prompts kept beside the images, a prompt at the end."""
    from elit.cli.main import main

    encoder = save_encoder("clip", tmp_path / "clip")
    sizes = "--model.hidden-size 16 --model.num-heads 1 --model.depth 3 --model.window 4 4 --model.text-length 8"
    run = f"--out {tmp_path / 'run'} --steps 2 --batch-size 4 --preview-every 2 --image-size 8 {sizes}"
    train = f"train --data {captioned} --model.name ELIT-MM-DiT-S/1 --model.text-encoder {encoder} {run}"
    assert main(train.split()) == 0
    assert len(list((captioned / ".text").glob("*.safetensors"))) == 1
    model = elit.load_model(tmp_path / "run" / "model")
    config = model.config
    assert (config.text_features, config.pooled_features, config.text_encoder) == (16, 16, encoder)
    out = tmp_path / "boat.png"
    capsys.readouterr()
    line = ["sample", str(tmp_path / "run/model"), "--prompts", *PROMPTS[:2], "--steps", "2"]
    assert main([*line, "--out", str(out)]) == 0
    assert "boat.png: 2 images" in capsys.readouterr().out
    assert Image.open(out).size == (2 * 66 - 2, 64)
