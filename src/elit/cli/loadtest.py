"""elit loadtest"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from elit.cli.main import show_progress
from elit.config import require
from elit.files import Json, check_new_output, write_text


@dataclass(frozen=True, kw_only=True)
class Args:
    """Send requests to a service at the times of a trace, however long earlier ones take, and report their outcomes:
    violations of deadlines (refusals included), latencies, budgets. Needs pip install 'elit-diffusion[serve]'.

    Example: elit loadtest http://127.0.0.1:8000 --rate 4 --seconds 60 --arrivals bursty --deadline-ms 2000
    """

    url: Annotated[str, tyro.conf.Positional]
    """URL of the service, without /v1."""
    rate: float = 2.0
    """Mean requests a second."""
    seconds: int = 30
    """How long requests are sent."""
    most: int = 10_000
    """Maximum number of requests."""
    arrivals: Literal["poisson", "bursty"] = "poisson"
    """The same rate in every second, or waves and bursts."""
    trace: Path | None = None
    """A file of arrivals instead: one JSON object a line, {"at": seconds}, optionally with deadline_ms and quality."""
    deadline_ms: float = 5000.0
    """Deadline of requests without one."""
    quality: Literal["auto", "low", "medium", "high"] = "auto"
    """Quality of requests without one."""
    prompts: tuple[str, ...] = ("0",)
    """Classes or texts, in turn."""
    seed: int = 0
    """Seed of arrivals and images."""
    api_key: str | None = None
    """Key of the service; default: ELIT_API_KEY of the environment."""
    write_trace: Path | None = None
    """Write the trace there, and send nothing."""
    overwrite: bool = False
    """Replace an existing file of --write-trace, once the new one is whole."""
    json: bool = False
    """Print the outcomes as JSON last on stdout."""

    def __post_init__(self) -> None:
        for name in ("rate", "seconds", "most", "deadline_ms"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.url.startswith(("http://", "https://")), "url", self.url, "http://HOST:PORT")
        require(len(self.prompts) > 0, "prompts", self.prompts, "at least one class or text")


def run(args: Args) -> Json:
    from elit.evaluate.report.tables import print_table
    from elit.serve.loadtest import arrivals, bursty_rates, over_time, read_trace, run_loadtest, summarize, trace_text

    if args.write_trace:
        check_new_output(args.write_trace, overwrite=args.overwrite, folder=False, name="write_trace")
    if args.trace:
        trace = read_trace(args.trace)
    else:
        even = [args.rate] * args.seconds
        rates = even if args.arrivals == "poisson" else bursty_rates(args.seconds, args.rate, args.seed)
        trace = arrivals(rates, args.seed, quality=args.quality)
    trace = trace[: args.most]
    if args.write_trace:
        write_text(args.write_trace, trace_text(trace))
        return {"trace": str(args.write_trace), "requests": len(trace)}
    url = args.url.rstrip("/").removesuffix("/v1")
    key = args.api_key or os.environ.get("ELIT_API_KEY") or None
    options: Json = {"prompts": args.prompts, "deadline_ms": args.deadline_ms, "key": key, "seed": args.seed}
    try:
        with show_progress("requests", len(trace)) as progress:
            outcomes = run_loadtest(url, trace, progress=progress, **options)
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'elit-diffusion[serve]'") from None
    summary = summarize(outcomes)
    statuses = {str(status): count for status, count in sorted(Counter(each.status for each in outcomes).items())}
    if not args.json:
        rows = [(name, "" if value is None else f"{value:.4g}") for name, value in summary.items()]
        rows += [(f"status {status}", str(count)) for status, count in statuses.items()]
        print_table(("", "measured"), rows, title=args.url)
    return {"summary": summary, "statuses": statuses, "over_time": over_time(outcomes)}
