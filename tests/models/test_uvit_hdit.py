"""Parts that U-ViT and HDiT add to DiT: which blocks are joined, and which tokens become one."""

import pytest
import torch
from conftest import inputs, opened

import elit
from elit.models.hdit import HDiT, WideBlock, merged_blocks
from elit.models.presets import model_config
from elit.models.uvit import skip_pairs


@pytest.mark.parametrize(("depth", "split"), [(5, None), (6, None), (6, (2, 3, 1)), (6, (1, 3, 2)), (28, (4, 20, 4))])
def test_pairs_nest_and_stay_in_their_kind_of_token(depth, split):
    pairs, (head, core, _) = skip_pairs(depth, split), split or (0, depth, 0)
    inside = range(head, head + core)
    assert depth != 28 or pairs == {block: 27 - block for block in range(13)}
    assert all((earlier in inside) == (later in inside) for earlier, later in pairs.items())
    pile = []  # what comes last goes first
    for block in range(depth):
        if block in pairs.values():
            assert pairs[pile.pop()] == block
        if block in pairs:
            pile.append(block)
    assert not pile


@pytest.mark.parametrize("kind", ["uvit", "elit-uvit"])
def test_skips_carry_the_mirrors_output(kind):
    """With forward hooks on every block: what comes in by the skip is what the mirror put out."""
    model, out, taken = opened(kind), {}, {}

    def remember(block, inputs, output):
        number = list(model.blocks).index(block)
        out[number] = output
        if len(inputs) > 3:
            taken[number] = inputs[3]

    for block in model.blocks:
        block.register_forward_hook(remember)
    model(*inputs(model), 5 if model.budgets else None)
    pairs = skip_pairs(6, model.spec.split if model.spec else None)
    assert pairs == {0: 5, 1: 4}
    assert set(taken) == set(pairs.values())
    assert all(torch.equal(out[earlier], taken[later]) for earlier, later in pairs.items())


def test_the_wide_blocks_of_hdit():
    assert merged_blocks(28) == range(8, 20)
    assert [len(merged_blocks(depth)) for depth in (1, 2, 3, 6, 12, 24)] == [1, 2, 1, 2, 6, 10]
    with torch.device("meta"):
        model = elit.create_model("ELIT-HDiT-XL/2")
    wide = [i for i, block in enumerate(model.blocks) if isinstance(block, WideBlock)]
    assert wide == list(range(8, 20))
    assert model.blocks[8].attention.qkv.in_features == 2 * 1152
    assert model.blocks[8].modulation.linear.in_features == 1152
    assert model.budgets == (4, 8, 12, 16)


def test_hdit_merges_two_by_two_neighbours_like_pixel_unshuffle():
    """The wide blocks' input is the linear map of each 2×2 cell, as torch's own pixel_unshuffle cuts it."""
    model, seen = opened("hdit"), {}
    first, wide = model.blocks[0], next(block for block in model.blocks if isinstance(block, WideBlock))
    first.register_forward_hook(lambda _, inputs, output: seen.update(fine=output))
    wide.register_forward_pre_hook(lambda _, inputs: seen.update(merged=inputs[0]))
    x, t, y = inputs(model)
    model(x, t, y)
    # Tokens lie in 2×2 windows: back to a picture of 8×8 tokens with d channels.
    picture = seen["fine"].unflatten(1, (4, 4, 2, 2)).permute(0, 5, 1, 3, 2, 4).reshape(3, 48, 8, 8)
    cells = torch.nn.functional.pixel_unshuffle(picture, 2).flatten(2).transpose(1, 2)  # channels d·4, d outermost
    cells = cells.unflatten(2, (48, 4)).transpose(2, 3).flatten(2)
    assert torch.allclose(model.merge(cells), seen["merged"], atol=1e-6)


def test_elit_hdit_merges_latents_of_one_group():
    model, seen = opened("elit-hdit"), {}
    wide = [block for block in model.blocks if isinstance(block, WideBlock)]
    wide[0].register_forward_pre_hook(lambda _, inputs: seen.update(merged=inputs[0], turns=inputs[2]))
    read = model.latent_interface.read
    model.latent_interface.read = lambda *inputs: seen.setdefault("latents", read(*inputs))
    x, t, y = inputs(model)
    model(x, t, y, 8)
    assert seen["latents"].shape == (3, 32, 48)  # 4 groups of 8
    assert seen["merged"].shape == (3, 8, 96)  # 4 groups of 2
    group = seen["latents"][:, 24:32].reshape(3, 2, 192)  # the last group's
    assert torch.allclose(model.merge(group), seen["merged"][:, 6:], atol=1e-6)
    assert len(seen["turns"].cos) == 8


def test_hdit_names_its_budgets_and_sizes():
    model = opened("elit-hdit")
    with pytest.raises(ValueError, match=r"\(4 to 16 in steps of 4\).* got 6"):
        model(*inputs(model), 6)
    with pytest.raises(ValueError, match=r"multiple of 4×4 \(nearest valid: 32 or 36.* got \(34, 34\)"):
        elit.create_model("HDiT-S/2", sample_size=34)
    assert model_config("ELIT-HDiT-S/2", depth=6)[1]["interface"]["split"] == [1, 4, 1]
    for depth in range(1, 40):
        head, core, tail = HDiT.default_split(depth)
        assert head + core + tail == depth
        assert head <= merged_blocks(depth).start
