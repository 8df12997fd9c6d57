"""elit loadtest"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.cli.main import parse as parse_arguments
from elit.cli.main import show_progress
from elit.files import check_new_output


@dataclass(frozen=True, kw_only=True)
class Args:
    """Send requests to a service as they would come, whatever becomes of those before, and say what became of them:
    violations of deadlines (refusals included), latencies, budgets. Needs pip install 'elit-diffusion[serve]'.

    Example: elit loadtest http://127.0.0.1:8000 --rate 4 --seconds 60 --arrivals bursty --deadline-ms 2000
    """

    url: Annotated[str, tyro.conf.Positional]
    """Of the service, without /v1."""
    rate: float = 2.0
    """Requests a second, in the mean."""
    seconds: int = 30
    """How long requests are sent."""
    most: int = 10_000
    """Requests in all, at most."""
    arrivals: Literal["poisson", "bursty"] = "poisson"
    """At the same rate in every second, or in waves and bursts."""
    trace: Path | None = None
    """A file instead: one JSON object a line, {"at": seconds}, where wanted with deadline_ms and quality."""
    deadline_ms: float = 5000.0
    """Of requests that have none."""
    quality: Literal["auto", "low", "medium", "high"] = "auto"
    """Of requests that have none."""
    prompts: tuple[str, ...] = ("0",)
    """Classes or texts, in turn."""
    seed: int = 0
    """Of arrivals and images."""
    api_key: str | None = None
    """Default: ELIT_API_KEY of the environment."""
    write_trace: Path | None = None
    """Write the trace there, and send nothing."""
    overwrite: bool = False
    """Replace the file of --write-trace that is there, once the new is whole."""
    json: bool = False
    """Print what happened as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "loadtest", arguments)
    for name in ("rate", "seconds", "most", "deadline_ms"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}={getattr(args, name)}: give a number above 0")
    if not args.url.startswith(("http://", "https://")):
        raise ValueError(f"url={args.url!r}: give http://HOST:PORT")
    if not args.prompts:
        raise ValueError("prompts: none given")
    return args


def run(args: Args) -> dict[str, Any]:
    from collections import Counter

    from elit.evaluate.report.tables import print_table
    from elit.serve.outcomes import over_time, summarize
    from elit.serve.trace import arrivals, bursty_rates, read_trace, steady_rates, write_trace

    if args.write_trace:
        check_new_output(args.write_trace, overwrite=args.overwrite, folder=False, name="write_trace")
    if args.trace:
        trace = read_trace(args.trace)
    else:
        bursty = args.arrivals == "bursty"
        rates = bursty_rates(args.seconds, args.rate, args.seed) if bursty else steady_rates(args.seconds, args.rate)
        trace = arrivals(rates, args.seed, quality=args.quality)
    trace = trace[: args.most]
    if args.write_trace:
        write_trace(args.write_trace, trace)
        return {"trace": str(args.write_trace), "requests": len(trace)}
    try:
        import aiohttp  # noqa: F401

        from elit.serve.loadtest import run_loadtest
    except ImportError:
        raise ValueError("aiohttp is missing; pip install 'elit-diffusion[serve]'") from None
    key = args.api_key or os.environ.get("ELIT_API_KEY") or None
    with show_progress("requests", len(trace)) as progress:
        outcomes = run_loadtest(
            args.url.rstrip("/").removesuffix("/v1"),
            trace,
            prompts=args.prompts,
            deadline_ms=args.deadline_ms,
            key=key,
            seed=args.seed,
            progress=progress,
        )
    summary = summarize(outcomes)
    statuses = {str(status): count for status, count in sorted(Counter(each.status for each in outcomes).items())}
    if not args.json:
        rows = [(name, "" if value is None else f"{value:.4g}") for name, value in summary.items()]
        rows += [(f"status {status}", str(count)) for status, count in statuses.items()]
        print_table(("", "measured"), rows, title=args.url)
    return {"summary": summary, "statuses": statuses, "over_time": over_time(outcomes)}
