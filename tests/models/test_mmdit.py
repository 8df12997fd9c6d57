"""MM-DiT against diffusers' own block; its text, and text encoders of the Hugging Face kinds."""

import json
import sys

import pytest
import torch
import transformers
from conftest import inputs, opened
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data._utils.pin_memory import pin_memory

import elit
from elit.models.conditioning import CharacterEncoder, Text, encode_characters
from elit.models.layers import rope_tables
from elit.models.mmdit import JointBlock, LastJointBlock
from elit.models.text import TextEncoder, embed_prompts, encode_prompts

D, HEADS, L, M = 48, 4, 9, 5


def random_block(kind) -> torch.nn.Module:
    torch.manual_seed(0)
    block = kind(D, HEADS, 4.0).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return block


def as_qwen(block: JointBlock) -> QwenImageTransformerBlock:
    """The same weights in diffusers' block; its rotation pairs neighbours, ours the two halves of a head."""
    h = D // HEADS
    pairs = torch.stack((torch.arange(h // 2), torch.arange(h // 2) + h // 2), 1).flatten()
    rows = (torch.arange(HEADS)[:, None] * h + pairs).flatten()
    theirs = QwenImageTransformerBlock(dim=D, num_attention_heads=HEADS, attention_head_dim=h).eval()
    weights = {}
    names = ("img", "to_{}", "norm_{}", "to_out.0"), ("txt", "add_{}_proj", "norm_added_{}", "to_add_out")
    for ours, (short, projection, norm, out) in zip((block.image, block.text), names, strict=True):
        layers = {
            f"{short}_mod.1": ours.modulation.linear,
            f"{short}_mlp.net.0.proj": ours.mlp.fc1,
            f"{short}_mlp.net.2": ours.mlp.fc2,
            f"attn.{out}": ours.attention.proj,
        }
        for name, layer in layers.items():
            weights |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        for i, part in enumerate("qkv"):
            weight, bias = (value.chunk(3)[i] for value in (ours.attention.qkv.weight, ours.attention.qkv.bias))
            order = slice(None) if part == "v" else rows
            name = f"attn.{projection.format(part)}"
            weights |= {f"{name}.weight": weight[order], f"{name}.bias": bias[order]}
        weights[f"attn.{norm.format('q')}.weight"] = ours.attention.q_norm.weight[pairs]
        weights[f"attn.{norm.format('k')}.weight"] = ours.attention.k_norm.weight[pairs]
    theirs.load_state_dict(weights)
    return theirs


@pytest.mark.parametrize("padded", [False, True])
def test_a_joint_block_equals_diffusers_qwen_image_block(padded):
    block = random_block(JointBlock)
    theirs = as_qwen(block)
    x, text, c = torch.randn(2, L, D), torch.randn(2, M, D), torch.randn(2, D)
    kept = torch.ones(2, M, dtype=torch.bool)
    if padded:
        kept[1, 2:] = False
    positions = torch.randint(0, 6, (L, 2)).float()
    rope = rope_tables(positions, D // HEADS)
    half = D // HEADS // 2
    turns = torch.complex(rope.cos[:, 0, :half], rope.sin[:, 0, half:])
    mask = torch.cat((kept, torch.ones(2, L, dtype=torch.bool)), 1)[:, None, None]
    with torch.no_grad():
        ours, ours_text = block(x, text, c, rope, mask)
        their_text, their_image = theirs(x, text, kept, c, (turns, torch.ones(M, half, dtype=torch.complex64)))
    assert torch.allclose(ours, their_image, atol=1e-5)
    assert torch.allclose(ours_text[kept], their_text[kept], atol=1e-5)


def test_the_last_block_is_a_joint_block_whose_text_goes_nowhere():
    whole, last = random_block(JointBlock), random_block(LastJointBlock)
    last.image.load_state_dict(whole.image.state_dict())
    with torch.no_grad():
        modulation = last.text_modulation.linear, whole.text.modulation.linear
        for ours, theirs in zip(last.text_kv.parameters(), whole.text.attention.qkv.parameters(), strict=True):
            ours.copy_(theirs[D:])
        for ours, theirs in zip(*(layer.parameters() for layer in modulation), strict=True):
            ours.copy_(theirs[: 2 * D])
        last.text_k_norm.weight.copy_(whole.text.attention.k_norm.weight)
        x, text, c = torch.randn(2, L, D), torch.randn(2, M, D), torch.randn(2, D)
        rope, mask = rope_tables(torch.randn(L, 2), D // HEADS), torch.ones(2, 1, 1, M + L, dtype=torch.bool)
        assert torch.allclose(last(x, text, c, rope, mask)[0], whole(x, text, c, rope, mask)[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["mmdit-embeddings", "elit-mmdit-embeddings"])
def test_padding_is_never_looked_at(kind):
    model = opened(kind)
    x, t, y = inputs(model)
    junk = Text(torch.where(y.mask[..., None], y.embeddings, 1e4), y.mask, y.pooled)
    assert torch.allclose(model(x, t, junk), model(x, t, y), atol=1e-5)
    more = Text(torch.nn.functional.pad(y.embeddings, (0, 0, 0, 3)), torch.nn.functional.pad(y.mask, (0, 3)), y.pooled)
    assert torch.allclose(model(x, t, more), model(x, t, y), atol=1e-5)
    if kind.startswith("elit"):  # no pooled features: bare embeddings are a text without padding
        whole = Text(y.embeddings, torch.ones_like(y.mask))
        for given in (lambda y: y, model.conditioning.without):
            assert torch.equal(model(x, t, given(y.embeddings)), model(x, t, given(whole)))


def test_characters_do_not_see_their_padding():
    model = opened("elit-mmdit")
    x, t, _ = inputs(model, batch=2)
    short, long = model.conditioning.prepare(["a one", "a one"]), model.conditioning.prepare(["a one", "a long one"])
    assert torch.allclose(model(x, t, short)[0], model(x, t, long)[0], atol=1e-5)
    assert not torch.allclose(model(x, t, short)[1], model(x, t, long)[1], atol=1e-3)


def test_pooled_text_defaults_to_the_mean_of_its_tokens():
    model = opened("mmdit")
    x, t, y = inputs(model, batch=2)
    text = model.conditioning.characters(y)
    means = [row[mask].mean(0) for row, mask in zip(text.embeddings, text.mask, strict=True)]
    pooled = Text(text.embeddings, text.mask, torch.stack(means).nan_to_num())
    assert torch.allclose(model(x, t, pooled), model(x, t, y), atol=1e-6)


def test_prompts_become_bytes():
    characters = encode_characters(["ab", "é"], 8)
    assert characters.tolist() == [[98, 99], [0xC3 + 1, 0xA9 + 1]]
    assert encode_characters([""], 8).tolist() == [[0]]
    assert CharacterEncoder(16)(torch.zeros(1, 3, dtype=torch.int64)).embeddings.isfinite().all()
    images = elit.sample(opened("elit-mmdit"), ["a one", "a six"], steps=1)
    assert images.shape == (2, 4, 16, 16)


@pytest.mark.parametrize(
    ("kind", "y", "message"),
    [
        ("mmdit", ["a very long prompt indeed"], "at most text_length=12 bytes, got 'a very long"),
        ("mmdit", [], "y must be at least one prompt"),
        ("mmdit", torch.tensor([[300]]), "y must be characters, bytes plus 1"),
        ("mmdit", torch.randn(1, 3, 9), r"y must be embeddings \(1, M, 24\), got \(1, 3, 9\)"),
        ("mmdit-embeddings", ["a one"], "y must be embeddings of 'some/encoder'"),
        ("mmdit-embeddings", torch.randn(1, 3, 20), r"y\.pooled must be \(1, 10\), got None"),
    ],
)
def test_wrong_text_is_named(kind, y, message):
    with pytest.raises(ValueError, match=message):
        elit.sample(opened(kind), y, steps=1)


WORDS = ("<pad>", "<eos>", "<unk>", "a", "red", "blue", "boat", "on", "the", "sea")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PROMPTS = ["a red boat", "a blue boat on the sea", "a boat"]


def save_encoder(kind: str, folder) -> str:
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
    with pytest.raises(ValueError, match=r"without transformers: pip install '\.\[text\]'"):
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
