"""elit sample"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.main import check_device, show_progress
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make images or clips with a trained model, at any budget and with any guidance.

    With a target the settings are planned: from elit profile's measurements, made first where there are none, and the
    table of elit sweep in the model's folder or beside it, if there is one.

    Example: elit sample runs/quickstart/model --labels 3 7 --count 16 --budget 50% --guidance ccfg --scale 2
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or pipeline."""
    out: Path = Path("samples.png")
    """A .png for one grid (of clips, their frames side by side), a .gif for moving clips, a folder for separate files,
    or a .npz for an array (uint8, N×H×W×3, as the ADM evaluator reads; float32 latents if there is no autoencoder)."""
    labels: tuple[str, ...] = ()
    """Classes, by number or name, in turn; default: all of the model's."""
    prompts: tuple[str, ...] = ()
    """Texts, in turn, for a text-conditional model."""
    text_encoder: str | None = None
    """Hugging Face name or folder of the encoder that a text-conditional model was trained with; default: as saved."""
    count: int | None = None
    """How many images; default: one a label or prompt, at most 64."""
    budget: str = "full"
    """Latents per group (8; 1 is one latent), a share of them (50%), all (100%), or a schedule over t
    (50%@0-0.5,100%@0.5-1)."""
    step_budgets: tuple[str, ...] = ()
    """Instead, one budget a step."""
    sample_budgets: tuple[str, ...] = ()
    """Instead, one budget an image; that many images are made."""
    guidance: Literal["none", "cfg", "ag", "ccfg"] = "none"
    """cfg drops the class in the second branch, ag lowers its budget, ccfg does both."""
    scale: float = 1.5
    """Guidance scale; 1 is off."""
    guidance_budget: str = "1"
    """Budget of the second branch of ag and ccfg: latents per group (1) or a share of them (25%)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; 0 = noise, 1 = data."""
    steps: int = 40
    """Solver steps."""
    target_ms: float | None = None
    """Plan steps, budget and guidance: milliseconds that one batch may take, without autoencoder and files."""
    target_images_per_s: float | None = None
    """The same as a rate."""
    target_gflops: float | None = None
    """The same for the FLOPs of an image."""
    solver: Literal["euler", "heun"] = "euler"
    """heun is second order and evaluates twice a step."""
    shift: float = 1.0
    """More of the steps near noise; 1 is even."""
    cache: float = 0.0
    """Step caching: a step reuses the last output while the time embedding has moved by less, relatively; 0 is off."""
    seed: int = 0
    """Seed of the first image; the next ones count up."""
    batch_size: int = 64
    """Images at a time; changes no image."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if `model` is one."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network; the solver's state stays float32."""
    compile: bool = False
    """Compile the network first: worth its minutes for many images, or large ones."""
    json: bool = False
    """Print what was made as JSON last on stdout."""


# Settings that a plan decides.
PLANNED = (
    "budget",
    "step_budgets",
    "sample_budgets",
    "guidance",
    "scale",
    "guidance_budget",
    "guidance_interval",
    "steps",
    "solver",
    "shift",
)
TARGETS = ("target_ms", "target_images_per_s", "target_gflops")


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "sample", arguments)
    given = [name for name in TARGETS if getattr(args, name) is not None]
    wrong = [name for name in PLANNED if getattr(args, name) != getattr(Args, name)]
    if given and wrong:
        raise ValueError(f"{given[0]}, {wrong[0]}: a target plans {', '.join(PLANNED)}; leave {wrong[0]} out")
    return args


def run(args: Args) -> dict[str, Any]:
    import time

    import torch

    from elit.data.autoencoders import decode, load_autoencoder
    from elit.data.images import output_kind, write_samples
    from elit.models.saved import load_model
    from elit.sampling.evaluations import sampling_flops
    from elit.sampling.sample import sample

    device = check_device(args.device)
    dtype = getattr(torch, args.dtype)
    model = load_model(args.model, torch_dtype=dtype).to(device)
    vae = load_autoencoder(args.vae or args.model / "vae", required=args.vae is not None, torch_dtype=dtype)
    if vae is not None:
        vae.to(device)

    clips = len(model.sample_size) == 3
    pictures = vae is not None or model.config.in_channels in (1, 3)
    output_kind(args.out, pictures=pictures, clips=clips)  # before the work, not after it
    conditions = chosen_conditions(args, model, device)
    count = len(args.sample_budgets) or min(len(conditions), 64) if args.count is None else args.count
    if count < 1:
        raise ValueError(f"count={count}: give at least 1")
    y = conditions[torch.arange(count) % len(conditions)]
    plan = planned(args, model, min(count, args.batch_size))
    settings: dict[str, Any] = {
        "steps": plan.steps if plan else args.steps,
        **({"budget": plan.budget} if plan else budget_arguments(args)),
        "guidance": plan.guidance if plan else chosen_guidance(args),
        "solver": args.solver,
        "shift": args.shift,
        "cache": plan.cache if plan else args.cache,
    }
    flops = sampling_flops(model, **settings)

    start = time.perf_counter()
    with show_progress("sampling", count) as progress:
        x = sample(
            model, y, seed=args.seed, batch_size=args.batch_size, progress=progress, compile=args.compile, **settings
        )
    seconds = time.perf_counter() - start
    if pictures:
        with torch.no_grad():
            x = torch.cat([decode(vae, part) for part in x.split(args.batch_size)])
    write_samples(x, args.out, pictures=pictures)
    result = {
        "out": str(args.out),
        "count": count,
        "gflops_per_image": flops / 1e9,
        "ms_per_image": 1e3 * seconds / count,
        "plan": plan and {"words": plan.words, "ms": plan.ms, "metric": plan.metric, "quality": plan.quality},
    }
    if not args.json:
        what = "clips" if clips else "images"
        print(f"{args.out}: {count} {what}, {flops / 1e9:.3f} GFLOPs and {result['ms_per_image']:.1f} ms each")
    return result


def budget_arguments(args: Args) -> dict[str, Any]:
    """The options that set budgets, as arguments of `elit.sample`."""
    given = {"budget": None if args.budget == "full" else args.budget}
    lists = {name: getattr(args, name) or None for name in ("step_budgets", "sample_budgets")}
    return given | lists


def planned(args: Args, model: Any, batch: int) -> Any:
    """The plan for the target, if there is one; measures this machine where nobody has."""
    targets = {name: getattr(args, name) for name in TARGETS}
    if not any(value is not None for value in targets.values()):
        return None

    from elit.cli.profile import measured
    from elit.planner.choose import find_profile, network_folder, plan
    from elit.planner.target import make_target

    make_target(**targets, batch=batch)  # before anything is measured for it
    folder = network_folder(args.model)
    profile = find_profile(model, folder, compile=args.compile)
    if profile is None and targets["target_gflops"] is None:
        print("elit sample: note: no profile of this machine yet; measuring for half a minute", file=sys.stderr)
        sizes = sorted({1, batch, *(size for size in (2, 4, 8) if size < batch)})
        profile, _ = measured(model, folder, batch_sizes=sizes, seconds=30.0, compile=args.compile)
    chosen = plan(model, batch=batch, profile=profile, cache=args.cache or None, compile=args.compile, **targets)
    if not args.json:
        print(chosen)
    return chosen


def chosen_guidance(args: Any) -> Any:
    """elit.CFG, AG or CCFG from the options of that name, or None."""
    from elit.budgets import parse_budget
    from elit.flow.guidance import AG, CCFG, CFG

    if args.guidance == "none":
        return None
    if args.guidance == "cfg":
        return CFG(args.scale, interval=args.guidance_interval)
    kind = AG if args.guidance == "ag" else CCFG
    return kind(args.scale, parse_budget(args.guidance_budget), interval=args.guidance_interval)


def chosen_conditions(args: Any, model: Any, device: str) -> Any:
    """y of every label or prompt. Raises ValueError where the model takes the other kind."""
    from elit.data.text import encode_prompts

    if "text_encoder" not in model.config:
        if args.prompts:
            raise ValueError(f"prompts={args.prompts[0]!r}: this model takes classes; give labels")
        return model.conditions(args.labels or range(model.config.num_classes))
    if args.labels:
        raise ValueError(f"labels={args.labels[0]}: this model takes text; give prompts")
    if not args.prompts:
        raise ValueError("prompts: none given; this model takes text, such as --prompts 'a handwritten seven'")
    encoder = args.text_encoder or model.config.text_encoder
    return encode_prompts(args.prompts, encoder, length=model.config.text_length, device=device)
