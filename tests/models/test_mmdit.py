"""MM-DiT's joint attention against diffusers' own block, and its text against padding and other ways in."""

import pytest
import torch
from conftest import inputs, opened
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

import elit
from elit.models.conditioning import CharacterEncoder, Text, encode_characters
from elit.models.layers import rope_tables
from elit.models.mmdit import JointBlock, LastJointBlock

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
    """With the text's keys and values of a whole block, the image comes out the same."""
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
