"""Small files laid out like the published checkpoints, and what their networks say, as plain loops over the spec.

Nothing here comes from elit: times, signs, orders and layouts are the authors'.
"""

import argparse
import math

import torch
import torch.nn.functional as F

ELIT = {"width": 48, "heads": 2, "depth": 4, "head": 1, "tail": 1, "size": 16, "window": 4, "channels": 4, "classes": 7}
READ, WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"


def weights(sizes: dict, *, elit: bool, double: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict with random values everywhere; `double` = the output has a variance beside every channel."""
    generator = torch.Generator().manual_seed(seed)
    d, c = sizes["width"], sizes["channels"]

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, torch.Tensor]:
        made = {f"{name}.weight": torch.randn(rows, columns, generator=generator) / columns**0.5}
        return made | ({f"{name}.bias": 0.1 * torch.randn(rows, generator=generator)} if bias else {})

    def table(rows: int) -> torch.Tensor:
        return 0.5 * torch.randn(rows, d, generator=generator)

    state = {"pos_embed": positions(sizes["size"] // 2, d)[None]}
    patch = linear("x_embedder.proj", d, 4 * c)
    state |= patch | {"x_embedder.proj.weight": patch["x_embedder.proj.weight"].view(d, c, 2, 2)}
    state |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    state["y_embedder.embedding_table.weight"] = table(sizes["classes"] + 1)
    for i in range(sizes["depth"]):
        state |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        state |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        state |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    state |= linear("final_layer.linear", 4 * c * (1 + double), d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    if elit:
        state[f"{READ}.learned_query_embed"], state[f"{READ}.pos_embed"] = (table(sizes["window"] ** 2) for _ in "ab")
        state[f"{READ}.latent_pos_embed"], state[f"{WRITE}.pos_embed"] = table(4096), table(sizes["window"] ** 2)
        state |= linear(f"{READ}.fit_layer.adaLN_modulation.1", 7 * d, d)
        for feed in (f"{READ}.fit_layer.read_ff.0", f"{WRITE}.write_ff.0"):
            state |= linear(f"{feed}.fc1", d, d, bias=False) | linear(f"{feed}.fc2", d, d, bias=False)
        for cross in (f"{READ}.fit_layer.latents_attend_to_patches.0", f"{WRITE}.patches_attend_to_latents.0"):
            state |= linear(f"{cross}.q_proj", d, d) | linear(f"{cross}.kv_proj", 2 * d, d)
            state |= linear(f"{cross}.proj", d, d)
            state |= {f"{cross}.{part}_norm.scale": 1 + 0.1 * table(1)[0] for part in "qk"}
    return state


def checkpoint(sizes: dict, *, elit: bool = True, **settings) -> dict:
    """A published file's content."""
    ema, model = (weights(sizes, elit=elit, seed=seed) for seed in (0, 1))
    args = {"model": f"{'ELIT-' if elit else ''}SiT-S/2", "encoder_depth": sizes["head"]}
    args |= {"elit_group_size": sizes["window"], "qk_norm": False, "path_type": "linear", "prediction": "v"}
    opt = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    return {"model": model, "ema": ema, "opt": opt, "args": argparse.Namespace(**args | settings), "steps": 10}


def positions(side: int, d: int) -> torch.Tensor:
    """(side², d), raster order: sines and cosines of the column, then of the row."""
    rows = []
    for place in range(side * side):
        angles = [[at / 10_000 ** (i / (d / 4)) for i in range(d // 4)] for at in (place % side, place // side)]
        rows.append([turn(angle) for each in angles for turn in (math.sin, math.cos) for angle in each])
    return torch.tensor(rows, dtype=torch.float64).float()


def apply(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def heads_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """(L, d) each, a loop over heads."""
    parts = zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
    return torch.cat([(a @ b.T / a.shape[-1] ** 0.5).softmax(-1) @ c for a, b, c in parts], -1)


def feed_forward(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return apply(state, f"{name}.fc2", F.gelu(apply(state, f"{name}.fc1", x), approximate="tanh"))


def block(state: dict, i: int, x: torch.Tensor, c: torch.Tensor, heads: int) -> torch.Tensor:
    """x (L, d), c (d,)."""
    a = apply(state, f"blocks.{i}.adaLN_modulation.1", F.silu(c)).chunk(6)
    q, k, v = apply(state, f"blocks.{i}.attn.qkv", norm(x) * (1 + a[1]) + a[0]).chunk(3, -1)
    x = x + a[2] * apply(state, f"blocks.{i}.attn.proj", heads_attend(q, k, v, heads))
    return x + a[5] * feed_forward(state, f"blocks.{i}.mlp", norm(x) * (1 + a[4]) + a[3])


def cross(state: dict, name: str, queries: torch.Tensor, context: torch.Tensor, heads: int) -> torch.Tensor:
    def rms(x: torch.Tensor, part: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-5) * state[f"{name}.{part}_norm.scale"]

    k, v = apply(state, f"{name}.kv_proj", context).chunk(2, -1)
    q = rms(apply(state, f"{name}.q_proj", queries), "q")
    return apply(state, f"{name}.proj", heads_attend(q, rms(k, "k"), v, heads))


def network(state: dict, sizes: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, budget=None) -> torch.Tensor:
    """The output of the authors' network for x (B, C, H, W) at its own times t, one sample after the other."""
    return torch.stack([_one(state, sizes, *each, budget) for each in zip(x, t, y, strict=True)])


def _one(state: dict, sizes: dict, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, budget) -> torch.Tensor:
    angles = t * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    c = apply(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    c = apply(state, "t_embedder.mlp.2", F.silu(c)) + state["y_embedder.embedding_table.weight"][y]
    s = F.conv2d(x[None], state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=2)
    s = s[0].flatten(1).T + state["pos_embed"][0]  # (N, d), raster order
    depth, heads, side = sizes["depth"], sizes["heads"], sizes["size"] // 2
    elastic = f"{READ}.pos_embed" in state
    head, tail = (sizes["head"], sizes["tail"]) if elastic else (0, 0)
    for i in range(head):
        s = block(state, i, s, c, heads)
    if elastic:
        s = _interface(state, sizes, s, c, budget, range(head, depth - tail))
    for i in range(depth - tail if elastic else 0, depth):
        s = block(state, i, s, c, heads)
    shift, scale = apply(state, "final_layer.adaLN_modulation.1", F.silu(c)).chunk(2)
    out = apply(state, "final_layer.linear", norm(s) * (1 + scale) + shift)  # (N, patch row · patch column · channel)
    channels = out.shape[1] // 4
    picture = torch.zeros(channels, 2 * side, 2 * side)
    for place, patch in enumerate(out.view(-1, 2, 2, channels)):
        row, column = 2 * (place // side), 2 * (place % side)
        picture[:, row : row + 2, column : column + 2] = patch.permute(2, 0, 1)
    return picture


def _interface(state: dict, sizes: dict, s: torch.Tensor, c: torch.Tensor, budget, core: range) -> torch.Tensor:
    side, w, heads = sizes["size"] // 2, sizes["window"], sizes["heads"]
    windows = [
        [(top + i) * side + left + j for i in range(w) for j in range(w)]
        for top in range(0, side, w)
        for left in range(0, side, w)
    ]  # places in the image, raster order inside each
    s, latents = s.clone(), torch.zeros_like(s)
    a = apply(state, f"{READ}.fit_layer.adaLN_modulation.1", F.silu(c)).chunk(7)
    for places in windows:
        s[places] = s[places] + state[f"{READ}.pos_embed"]
        start = state[f"{READ}.learned_query_embed"]
        seen = norm(s[places]) * (1 + a[1]) + a[0]
        read = start + a[2] * cross(state, f"{READ}.fit_layer.latents_attend_to_patches.0", start, seen, heads)
        changed = feed_forward(state, f"{READ}.fit_layer.read_ff.0", norm(read) * (1 + a[4]) + a[3])
        latents[places] = read + a[5] * changed
    latents = latents + state[f"{READ}.latent_pos_embed"][: side * side]
    kept = int(w * w * (1.0 if budget is None else budget))
    taken = [place for places in windows for place in places[:kept]]
    through = latents[taken]
    for i in core:
        through = block(state, i, through, c, heads)
    latents[taken] = through
    for places in windows:
        x = s[places] + state[f"{WRITE}.pos_embed"]
        x = x + cross(state, f"{WRITE}.patches_attend_to_latents.0", x, latents[places], heads)
        s[places] = x + feed_forward(state, f"{WRITE}.write_ff.0", x)
    return s


def sampler(velocity, z: torch.Tensor, steps: int, *, w: float, low: float, high: float, heun: bool) -> torch.Tensor:
    """velocity(x, t, weak) of the authors, from t = 1 to 0, the state in float64."""

    def guided(x: torch.Tensor, t: float) -> torch.Tensor:
        main = velocity(x.float(), t, False).double()
        if w <= 1 or not low <= t <= high:
            return main
        weak = velocity(x.float(), t, True).double()
        return weak + w * (main - weak)

    x = z.double()
    for step in range(steps):
        t, after = 1 - step / steps, 1 - (step + 1) / steps
        v = guided(x, t)
        if heun and step < steps - 1:
            v = (v + guided(x + (after - t) * v, after)) / 2
        x = x + (after - t) * v
    return x
