"""elit serve"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.arguments import free_port
from elit.cli.main import check_device
from elit.cli.main import parse as parse_arguments
from elit.files import check_new_output


@dataclass(frozen=True, kw_only=True)
class Args:
    """Serve images over OpenAI's API with a budget that follows the load: every request gets the most compute that all
    deadlines allow. Ray Serve, on this machine or on a cluster. Needs pip install 'elit-diffusion[serve]'.

    Example: elit serve runs/quickstart/model --deadline-ms 2000
    """

    model: Annotated[Path, tyro.conf.Positional] = Path()
    """Folder of a saved model or ElitPipeline, of a diffusers pipeline whose transformer has a dial, or of an add-on of
    elit distill; or fashion, the model in the box."""
    host: str = "127.0.0.1"
    """Address to listen at; any but this machine's own needs a key."""
    port: int = 8000
    """0 = any free one."""
    api_key: str | None = None
    """That clients must send as Authorization: Bearer KEY; default: ELIT_API_KEY of the environment, where ps does not
    show it."""
    name: str = ""
    """Of the model, for clients; default: the folder's."""
    steps: int | None = None
    """Solver steps at full quality; default: the ladder of settings is from the table of elit sweep beside the model
    (sweep.jsonl), and has 20 steps where there is none."""
    least_steps: int | None = None
    """Where even the least budget is too slow, down to so many steps; default: half."""
    least_budget: str = ""
    """The floor: 8 latents per group, or a share such as 25%; default: the model's least."""
    guidance_scale: float | None = None
    """Of requests that name none; 1 is off. Default: off, or what a pipeline's own call has."""
    guidance_budget: str = ""
    """Of the second branch (CCFG); default: as the first (CFG)."""
    deadline_ms: float = 5000.0
    """Of requests that name none."""
    size: str = ""
    """Such as 1024x768: of a pipeline's pictures where a request names none; default: the pipeline's own."""
    max_batch: int = 0
    """Images in progress at a time in a replica; default: as many as pay, at most 8."""
    max_queue: int = 64
    """Images waiting at a replica at most; more are refused."""
    most_images: int = 4
    """Images of one request."""
    most_steps: int = 100
    """Steps of one request."""
    replicas: int = 1
    """Copies of the model."""
    min_replicas: int = 0
    """Autoscaling, with --max-replicas."""
    max_replicas: int = 0
    """Autoscaling between --min-replicas and so many; 0 = off."""
    cpus: float = 1.0
    """Cores that Ray books for a replica."""
    gpus: float | None = None
    """GPUs of a replica; default: 1 on a GPU, else 0. 0.5 puts two on one."""
    threads: int | None = None
    """Of a replica on a CPU; default: as elit sample has here, divided by --replicas."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network."""
    compile: bool = False
    """Compile the network first."""
    exact: bool | None = None
    """Every image alone in its forward, so that its bytes do not depend on the load; default: on a CPU."""
    profile: Path | None = None
    """Of elit profile; default: the one beside the model, or measured at the start."""
    drain_seconds: float = 30.0
    """After SIGTERM, for requests that are here."""
    address: str | None = None
    """Of a Ray cluster, such as auto or ray://head:10001; default: this machine alone."""
    build: Path | None = None
    """Write the Serve config that serve deploy takes, and serve nothing."""
    overwrite: bool = False
    """Replace the file of --build that is there, once the new is whole."""
    json: bool = False
    """Print what happened as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    if any(word.split("=")[0] == "--simulate" for word in arguments):
        raise ValueError("simulate: moved; use python benchmarks/simulator.py TRACE --profile FILE, in the repository")
    args: Args = parse_arguments(Args, "serve", arguments)
    if args.model == Path():
        raise ValueError("model: none given; name a folder, or fashion")
    return args


def run(args: Args) -> dict[str, Any]:
    if args.build:
        check_new_output(args.build, overwrite=args.overwrite, folder=False, name="build")
    for package in ("ray", "fastapi", "prometheus_client"):
        if importlib.util.find_spec(package) is None:  # Ray itself is imported by `start`, which sets its environment
            raise ValueError(f"{package} is missing; pip install 'elit-diffusion[serve]'")

    from elit.serve.server import Placement, StopSignal, check_key, start, stop, write_config
    from elit.serve.settings import KEY_VARIABLE

    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    check_key(args.host, key)
    device = check_device(args.device)
    placement = Placement(
        host=args.host,
        port=args.port,
        address=args.address,
        replicas=args.replicas,
        min_replicas=args.min_replicas,
        max_replicas=args.max_replicas,
        cpus=args.cpus,
        gpus=args.gpus if args.gpus is not None else float(device.startswith("cuda")),
        drain_seconds=args.drain_seconds,
    )
    service = settings(args, device, needs_key=key is not None)
    if args.build:
        write_config(args.build, service, placement)
        if not args.json:
            print(f"{args.build}: serve deploy {args.build}")
        return {"config": str(args.build)}
    if not args.address:
        placement = replace(placement, port=free_port(args.host, args.port))
    stop_signal = StopSignal()
    try:
        url = start(service, placement, stop_signal, key)
        print(f"elit serve: {service.name} at {url}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        stop_signal.wait()
        print("elit serve: stopping; finishing what is here", file=sys.stderr, flush=True)
    finally:
        left = stop(args.drain_seconds)
    return {"url": url, "unfinished": left}


def settings(args: Args, device: str, *, needs_key: bool) -> Any:
    """The service's settings. Raises ValueError for a model or budget that cannot be."""
    import torch

    from elit.elastic.load import is_stock_pipeline, load_model
    from elit.models.transformer import Transformer
    from elit.pretrained import model_folder, model_name
    from elit.serve.settings import STEPS, ServiceSettings

    folder = model_folder(args.model)
    network = None
    # Before Ray is started for it; a pipeline may be large, so its add-on alone is read.
    if is_stock_pipeline(folder):
        from elit.elastic.stock import find_stock

        stock = find_stock(folder)
        assert stock is not None
        budgets = tuple(stock.budgets)
    elif not isinstance(network := load_model(folder), Transformer):
        raise ValueError(f"model={str(args.model)!r}: an elastified transformer alone; give the folder of its pipeline")
    else:
        budgets = network.budgets
    threads = args.threads
    if threads is None and device == "cpu":
        threads = max(1, torch.get_num_threads() // args.replicas)
    name = model_name(folder)
    packaged = name != str(folder)
    service = ServiceSettings(
        model=name if packaged else str(folder.absolute()),
        name=args.name or folder.absolute().name,
        steps=STEPS if args.steps is None else args.steps,
        least_steps=args.least_steps,
        least_budget=args.least_budget,
        guidance_scale=args.guidance_scale,
        guidance_budget=args.guidance_budget,
        size=args.size,
        deadline_ms=args.deadline_ms,
        device=device,
        dtype=args.dtype,
        compile=args.compile,
        exact=args.exact,
        threads=threads,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        profile=str(args.profile.absolute()) if args.profile else "",
        most_images=args.most_images,
        most_steps=args.most_steps,
        needs_key=needs_key,
    )
    service.ladder(budgets)
    return service if args.steps is not None else by_table(service, network, folder)


def by_table(service: Any, network: Any, folder: Path) -> Any:
    """The service with the ladder of a sweep's table where there is one, and a line that says so."""
    from elit.models.transformer import Transformer
    from elit.serve.table_ladder import find_ladder

    measured = find_ladder(network, folder, service) if isinstance(network, Transformer) else None
    if measured is None:
        return service
    print(f"elit serve: {measured}", file=sys.stderr, flush=True)
    return replace(service, steps=measured.rungs[-1][0], rungs=measured.rungs)
