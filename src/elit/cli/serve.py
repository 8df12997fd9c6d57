"""elit serve"""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from elit.cli.main import Output, check_device, free_port
from elit.files import Json, check_new_output
from elit.serve import LOOPBACK
from elit.serve.settings import KEY_VARIABLE, ServiceSettings


@dataclass(frozen=True, kw_only=True)
class Args(ServiceSettings, Output):
    __doc__ = ServiceSettings.__doc__

    api_key: str | None = None
    """Key that clients must send as Authorization: Bearer KEY; default: ELIT_API_KEY of the environment, where ps does
    not show it."""
    show_ladder: Annotated[bool, tyro.conf.arg(name="ladder")] = False
    """List the ladder that the table of elit sweep gives, from the cheapest."""
    build: Path | None = None  # Write the Serve config that serve deploy takes, and serve nothing.


def run(args: Args) -> Json:
    if args.build:
        check_new_output(args.build, overwrite=args.overwrite, name="build")
    for package in ("ray", "fastapi", "prometheus_client"):
        if importlib.util.find_spec(package) is None:  # Ray itself is imported by `start`, which sets its environment
            raise ValueError(f"{package} is missing; pip install '.[serve]' in a clone")
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    if args.host not in LOOPBACK and not key:
        where = f"or {KEY_VARIABLE} in the environment"
        raise ValueError(f"host={args.host!r}: others can reach it; give --api-key, {where}")
    if key and not re.fullmatch("[!-~]{8,}", key):
        raise ValueError("api_key must be at least 8 printable characters without a space")
    service = settings(args, check_device(args.device), needs_key=key is not None)

    from elit.serve.server import listen, say, start, stop, told, write_config

    if args.build:
        write_config(args.build, service)
        if not args.json:
            print(f"{args.build}: serve deploy {args.build}")
        return {"config": str(args.build)}
    if not service.address:
        service = replace(service, port=free_port(service.host, service.port))
    listen()
    url = None
    try:
        url = start(service, key)
        say(f"{service.name} at {url}/v1 (Ctrl-C stops)")
        told.wait()
        say("stopping; finishing unanswered requests")
    finally:
        left = stop(service, started=url is not None)
    return {"url": url, "unfinished": left}


def settings(args: Args, device: str, *, needs_key: bool) -> ServiceSettings:
    """The settings with all that depends on this machine and the model. Raises ValueError for an invalid budget."""
    import torch

    from elit.elastic.load import load_model, open_pipeline
    from elit.models.transformer import Transformer
    from elit.pretrained import model_name

    # Before Ray is started for it; a pipeline may be large, so its add-on alone is read.
    pipeline = open_pipeline(args.model)
    network = load_model(args.model) if pipeline is None else None
    if network is not None and not isinstance(network, Transformer):
        raise ValueError(f"model={str(args.model)!r}: an elastified transformer alone; give the folder of its pipeline")
    folder, threads = args.model.absolute(), args.threads
    if threads is None and device == "cpu":
        threads = max(1, torch.get_num_threads() // args.replicas)
    service = replace(
        args,
        model=folder if model_name(args.model) == str(args.model) else Path(model_name(args.model)),
        name=args.name or folder.name,
        device=device,
        gpus=float(device.startswith("cuda")) if args.gpus is None else args.gpus,
        threads=threads,
        profile=args.profile.absolute() if args.profile else None,
        needs_key=needs_key,
    )
    opened: Any = pipeline or network
    service.ladder(opened.budgets)
    if args.steps is None and network is not None:
        from elit.serve.ladder import find_ladder

        plans, line = find_ladder(network, args.model, service)
        if plans:
            print(f"elit serve: {line}", file=sys.stderr, flush=True)
            rungs: Any = tuple((plan.steps, plan.budget) for plan in plans)
            service = replace(service, steps=rungs[-1][0], rungs=rungs)
        for each in plans if args.show_ladder else ():
            print(f"  {each.describe()}: {each.gflops:.4g} GFLOPs, {each.metric} {each.quality:.4g}", file=sys.stderr)
    return service
