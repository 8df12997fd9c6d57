"""elit serve"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elit.cli.main import check_device, free_port
from elit.cli.main import parse as parse_arguments
from elit.files import Json, check_new_output
from elit.serve.settings import KEY_VARIABLE, ServiceSettings, check_key


@dataclass(frozen=True, kw_only=True)
class Args(ServiceSettings):
    __doc__ = ServiceSettings.__doc__

    api_key: str | None = None
    """Key that clients must send as Authorization: Bearer KEY; default: ELIT_API_KEY of the environment, where ps does
    not show it."""
    build: Path | None = None
    """Write the Serve config that serve deploy takes, and serve nothing."""
    overwrite: bool = False
    """Replace an existing file of --build, once the new one is whole."""
    json: bool = False
    """Print the result as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    if any(word.split("=")[0] == "--simulate" for word in arguments):
        raise ValueError("simulate: moved; use python benchmarks/simulator.py TRACE --profile FILE, in the repository")
    args: Args = parse_arguments(Args, "serve", arguments)
    return args


def run(args: Args) -> Json:
    if args.build:
        check_new_output(args.build, overwrite=args.overwrite, folder=False, name="build")
    for package in ("ray", "fastapi", "prometheus_client"):
        if importlib.util.find_spec(package) is None:  # Ray itself is imported by `start`, which sets its environment
            raise ValueError(f"{package} is missing; pip install 'elit-diffusion[serve]'")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    check_key(args.host, key)
    service = settings(args, check_device(args.device), needs_key=key is not None)

    from elit.serve.server import StopSignal, start, stop, write_config

    if args.build:
        write_config(args.build, service)
        if not args.json:
            print(f"{args.build}: serve deploy {args.build}")
        return {"config": str(args.build)}
    if not service.address:
        service = replace(service, port=free_port(service.host, service.port))
    stop_signal = StopSignal()
    try:
        url = start(service, stop_signal, key)
        print(f"elit serve: {service.name} at {url}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)
        stop_signal.wait()
        print("elit serve: stopping; finishing unanswered requests", file=sys.stderr, flush=True)
    finally:
        left = stop(service.drain_seconds)
    return {"url": url, "unfinished": left}


def settings(args: ServiceSettings, device: str, *, needs_key: bool) -> ServiceSettings:
    """The settings with all that depends on this machine and the model. Raises ValueError for an invalid budget."""
    import torch

    from elit.elastic.load import load_model, open_pipeline
    from elit.models.transformer import Transformer
    from elit.pretrained import model_name

    network: Any = None
    # Before Ray is started for it; a pipeline may be large, so its add-on alone is read.
    if (pipeline := open_pipeline(args.model)) is not None:
        budgets = tuple(pipeline.budgets)
    elif not isinstance(network := load_model(args.model), Transformer):
        raise ValueError(f"model={str(args.model)!r}: an elastified transformer alone; give the folder of its pipeline")
    else:
        budgets = network.budgets
    folder = args.model.absolute()
    service = replace(
        args,
        model=folder if model_name(args.model) == str(args.model) else Path(model_name(args.model)),
        name=args.name or folder.name,
        device=device,
        gpus=float(device.startswith("cuda")) if args.gpus is None else args.gpus,
        profile=args.profile.absolute() if args.profile else None,
        needs_key=needs_key,
    )
    if args.threads is None and device == "cpu":
        service = replace(service, threads=max(1, torch.get_num_threads() // args.replicas))
    service.ladder(budgets)
    if args.steps is None and network is not None:
        from elit.serve.table_ladder import find_ladder

        rungs, line = find_ladder(network, args.model, service)
        if rungs:
            print(f"elit serve: {line}", file=sys.stderr, flush=True)
            service = replace(service, steps=rungs[-1][0], rungs=rungs)
    return service
