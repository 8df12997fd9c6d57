"""Properties of every backbone, with and without the interface; then what U-ViT and HDiT add."""

import pytest
import torch
from conftest import ELIT, SETTINGS, conditions, fresh, inputs, opened
from torch._dynamo.testing import CompileCounter

import elit
from elit.elastic.load import load_model
from elit.flow.guidance import make_guidance
from elit.models.conditioning import concatenate
from elit.models.hdit import WideBlock, merged_blocks
from elit.models.presets import create_model
from elit.models.uvit import skip_pairs
from elit.sampling.sample import sample, seeded_noise

# The published checkpoints' Write looks at dropped latents too; what SiT does instead is in test_interface.py.
SLICED = [kind for kind in ELIT if kind != "elit-sit"]


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("kind", SLICED)
def test_budget_equals_a_truncated_model(kind, which):
    """A model whose interface only ever had `kept` latents: its outputs and gradients, and those past it are 0."""
    model = opened(kind)
    kept = model.budgets[which]
    name, settings = SETTINGS[kind]
    truncated = create_model(name, **settings, num_latents=kept).eval()
    weights = model.state_dict()
    weights["latent_interface.latents"] = weights["latent_interface.latents"][:kept]
    truncated.load_state_dict(weights)
    x, t, y = inputs(model)
    assert truncated.budgets[-1] == kept
    assert not torch.allclose(model(x, t, y, kept), model(x, t, y), atol=1e-3)
    with torch.no_grad():
        model.latent_interface.latents[kept:] = torch.nan  # never touched
    out, right = model(x, t, y, kept), truncated(x, t, y)
    assert torch.equal(out, right)
    out.square().mean().backward()
    right.square().mean().backward()
    assert not model.latent_interface.latents.grad[kept:].any()
    for (name, weight), theirs in zip(model.named_parameters(), truncated.parameters(), strict=True):
        assert torch.equal(weight.grad[: len(theirs)], theirs.grad), name


@pytest.mark.parametrize("kind", [kind for kind in ELIT if kind != "elit-mmdit-embeddings"])
def test_baseline_and_elit_share_their_weights(kind):
    """The baseline is the same class: ELIT adds `latent_interface` and renames nothing."""
    plain, elastic = (opened(each).state_dict() for each in (kind.removeprefix("elit-"), kind))
    added = set(elastic) - set(plain)
    assert set(plain) <= set(elastic)
    assert all(name.startswith("latent_interface.") for name in added)
    assert all(elastic[name].shape == value.shape for name, value in plain.items())


def test_runs_at_a_larger_resolution(any_model):
    """One set of weights; the parts that see the small size do not change what a crop of tokens is."""
    larger = tuple(2 * length for length in any_model.sample_size)
    x, t, y = inputs(any_model, size=larger)
    out = any_model(x, t, y)
    assert out.shape == x.shape
    assert out.isfinite().all()
    rebuilt = type(any_model)(**{k: v for k, v in any_model.config.items() if k[0] != "_"} | {"sample_size": larger})
    rebuilt.load_state_dict(any_model.state_dict())
    assert torch.equal(rebuilt(x, t, y), out)


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_every_parameter_gets_a_gradient_within_a_few_steps(kind):
    model = fresh(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, t, y = inputs(model, batch=4)
    reached: set[str] = set()
    for _ in range(5):
        optimizer.zero_grad()
        (model(x, t, y) - x.flip(0)).square().mean().backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert reached == {n for n, _ in model.named_parameters()}


def test_gradient_checkpointing_changes_no_number(any_model):
    x, t, y = inputs(any_model)

    def gradients() -> list[torch.Tensor]:
        any_model.zero_grad()
        any_model(x, t, y).square().mean().backward()
        return [p.grad.clone() for p in any_model.parameters()]

    plain = gradients()
    any_model.enable_gradient_checkpointing()
    assert all(map(torch.equal, plain, gradients()))


def test_save_and_load_is_bit_exact(any_model, tmp_path):
    any_model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "elit_network.py",
        "diffusion_pytorch_model.safetensors",
    }
    loaded = type(any_model).from_pretrained(tmp_path)
    x, t, y = inputs(any_model)
    assert torch.equal(loaded(x, t, y), any_model(x, t, y))
    public = {k: v for k, v in any_model.config.items() if k[0] != "_"}
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == public
    assert torch.equal(load_model(tmp_path)(x, t, y), any_model(x, t, y))


def test_bfloat16_is_close_to_float32(any_model):
    x, t, y = inputs(any_model)
    with torch.no_grad():
        expected = any_model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = any_model(x, t, y)
        for out in (mixed, any_model.to(torch.bfloat16)(x.bfloat16(), t, y)):
            assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_forward_reads_nothing_back(any_model):
    """On the meta device there are no values: whatever syncs with the host fails here."""
    x, t, y = (value.to("meta") for value in inputs(any_model))
    assert any_model.to("meta")(x, t, y, any_model.budgets[0] if any_model.budgets else None).shape == x.shape


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_forward_on_cuda_does_not_sync_and_matches_the_cpu(any_model):
    x, t, y = inputs(any_model)
    expected = any_model(x, t, y)
    any_model.to("cuda")
    x, t, y = x.cuda(), t.cuda(), y.cuda()
    any_model(x, t, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = any_model(x, t, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(out.cpu(), expected, atol=1e-3)


# Tracing takes half a second a block. HDiT's core has blocks of its own, a pair of U-ViT's has a skip, an MM-DiT hands
# its text from stage to stage, SiT writes dropped latents; test_precision.py compiles the DiT.
SPLITS = {"elit-hdit": (1, 1, 1), "elit-mmdit": (1, 1, 0), "elit-uvit": (0, 2, 0), "elit-sit": (0, 1, 0)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "split"), SPLITS.items())
def test_compiles_without_breaks_and_twice_at_most(kind, split):
    model = opened(kind, depth=sum(split), split=split)
    x, t, y = inputs(model)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for budget in model.budgets[:0:-3]:
            assert torch.allclose(compiled(x, t, y, budget), model(x, t, y, budget), atol=1e-5)
    torch._dynamo.reset()
    assert counter.frame_count <= 2


STEPS = 3  # Heun corrects all but the last


@pytest.mark.parametrize(("guide", "solver"), [("none", "heun"), ("cfg", "euler"), ("ag", "euler"), ("ccfg", "heun")])
def test_sampling_against_a_loop_of_single_calls(any_model, guide, solver):
    model, y = any_model, conditions(any_model, 2)
    if not model.budgets and guide in ("ag", "ccfg"):
        return
    kept, low = (model.budgets[len(model.budgets) // 2], model.budgets[0]) if model.budgets else (None, None)
    guidance = make_guidance(guide, 2.0, low)
    out = sample(model, y, steps=STEPS, budget=kept, guidance=guidance, solver=solver, seed=5)
    for i in range(2):
        x, mine = seeded_noise([5 + i], (4, *model.sample_size)), y[i : i + 1]
        null = model.conditioning.without(mine)

        def velocity(x, t, mine=mine, null=null):
            with torch.no_grad():
                main = model(x, torch.tensor([t]), mine, kept)
                if guide == "none":
                    return main
                weak_y, weak_budget = {"cfg": (null, kept), "ag": (mine, low), "ccfg": (null, low)}[guide]
                return 2 * main - model(x, torch.tensor([t]), weak_y, weak_budget)

        for k in range(STEPS):
            t, dt = k / STEPS, 1 / STEPS
            v = velocity(x, t)
            if solver == "heun" and k < STEPS - 1:
                v = (v + velocity(x + dt * v, t + dt)) / 2
            x = x + dt * v
        assert torch.allclose(out[i : i + 1], x, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch(any_model):
    guidance = elit.CCFG(2.0, any_model.budgets[0]) if any_model.budgets else elit.CFG(2.0)
    y = conditions(any_model, 8)
    settings = {"steps": 2, "guidance": guidance, "seed": 7}
    whole = sample(any_model, y, **settings)
    for batch_size in (2, 1):
        assert torch.allclose(sample(any_model, y, batch_size=batch_size, **settings), whole, atol=1e-5)
    third = sample(any_model, y[3:4], **settings | {"seed": 10})
    assert torch.allclose(third, whole[3:4], atol=1e-5)
    chosen = sample(any_model, concatenate([y[6:7], y[1:2]]), **settings | {"seed": [13, 8]})
    assert torch.allclose(chosen, whole[[6, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (17, 16)}, r"nearest valid: 16 or 18 × 16\), got \(17, 16\)"),
        ({"budget": 17}, "1 to 16.* got 17"),
        ({"y": 6}, r"y must be labels 0 to 4, or 5 for no class, got \[6"),
        ({"t": 1.25}, r"t must be 0 .* got \[1\.25"),
        ({"channels": 3}, r"x must be \(B, 4, H, W\) .*got \(3, 3, 16, 16\)"),
        ({"batch": 2}, r"t must be \(2,\), one time a sample, got \(3,\)"),
    ],
)
def test_wrong_input_is_named(change, message):
    model = opened("elit-dit")
    x, t, y = inputs(model)
    x = torch.randn(change.get("batch", 3), change.get("channels", 4), *change.get("size", (16, 16)))
    t = torch.full((3,), change["t"]) if "t" in change else t
    if "y" in change:
        y = torch.full((3,), change["y"])
    with pytest.raises(ValueError, match=message):
        model(x, t, y, change.get("budget"))


def test_a_baseline_has_no_budget():
    model = opened("dit")
    with pytest.raises(ValueError, match="budget must be None, since this model has no latent interface"):
        model(*inputs(model), 0.5)
    with pytest.raises(ValueError, match="share_head must go with a list of budgets"):
        model(*inputs(model), [None, None], share_head=True)


def test_classes_go_by_name_where_the_network_knows_them(tmp_path):
    names = ("t-shirt", "ankle boot", "sneaker")
    settings = {"sample_size": 8, "hidden_size": 24, "num_heads": 2, "depth": 3, "num_classes": 3}
    model = create_model("ELIT-DiT-S/2", class_names=names, **settings)
    for asked, numbers in (("Sneaker", [2]), (["T_Shirt", "ankle-boot", 2, "1"], [0, 1, 2, 1]), ([1, 2], [1, 2])):
        assert model.conditioning.prepare(asked).tolist() == numbers
    with pytest.raises(ValueError, match=r"labels must be .* got 'sneeker'; did you mean 'sneaker'"):
        model.conditioning.prepare(["sneeker"])
    for label in ("7", "3", "-1"):  # 3 would be no class
        with pytest.raises(ValueError, match=f"labels must be classes of this model, got '{label}'; classes: t-shirt"):
            model.conditioning.prepare([label])
    with pytest.raises(ValueError, match="labels 0 to 2"):
        model.conditioning.prepare([7])
    model.conditioning.class_names = ("10", "3", "7")
    assert model.conditioning.prepare(["07", "10", 1]).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="got '1'; did you mean '10'"):
        model.conditioning.prepare(["1"])
    model.conditioning.class_names = names
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).conditioning.prepare(["sneaker"]).tolist() == [2]
    with pytest.raises(ValueError, match="labels must be a class, 0 to 2, by number alone"):
        create_model("ELIT-DiT-S/2", **settings).conditioning.prepare(["sneaker"])


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
