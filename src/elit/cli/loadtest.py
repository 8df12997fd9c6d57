"""elit loadtest"""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from elit.cli.main import Command, show_progress
from elit.config import require
from elit.files import Json


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """Send requests to a service at Poisson times, however long earlier ones take, and report their outcomes:
    violations of deadlines (refusals included), latencies, budgets. Needs the extra serve.

    Example: elit loadtest http://127.0.0.1:8000 --rate 4 --seconds 60 --burst 3 --deadline-ms 2000
    """

    url: Annotated[str, tyro.conf.Positional]  # URL of the service, without /v1.
    rate: float = 2.0  # Requests a second.
    burst: float = 1.0  # In the middle third of the time the rate is this many times as high.
    seconds: int = 30  # How long requests are sent.
    deadline_ms: float = 5000.0  # Deadline of every request.
    quality: Literal["auto", "low", "medium", "high"] = "auto"  # Quality of every request.
    prompts: tuple[str, ...] = ("0",)  # Classes or texts, in turn.
    seed: int = 0  # Seed of arrivals and images.
    api_key: str | None = None  # Key of the service; default: ELIT_API_KEY of the environment.

    def __post_init__(self) -> None:
        for name in ("rate", "burst", "seconds", "deadline_ms"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.url.startswith(("http://", "https://")), "url", self.url, "http://HOST:PORT")
        require(len(self.prompts) > 0, "prompts", self.prompts, "at least one class or text")


def run(args: Args) -> Json:
    from elit.evaluate.tables import print_table
    from elit.serve.loadtest import arrivals, run_loadtest, summarize

    thirds = [3 * second // args.seconds for second in range(args.seconds)]
    times = arrivals([args.rate * (args.burst if third == 1 else 1) for third in thirds], args.seed)
    url, key = args.url.rstrip("/").removesuffix("/v1"), args.api_key or os.environ.get("ELIT_API_KEY") or None
    options: Json = {name: getattr(args, name) for name in ("prompts", "deadline_ms", "quality", "seed")}
    try:
        with show_progress("requests", len(times)) as progress:
            outcomes = run_loadtest(url, times, key=key, progress=progress, **options)
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install '.[serve]' in a clone") from None
    summary = summarize(outcomes)
    statuses = {str(status): count for status, count in sorted(Counter(each.status for each in outcomes).items())}
    if not args.json:
        rows = [(name, "" if value is None else f"{value:.4g}") for name, value in summary.items()]
        rows += [(f"status {status}", str(count)) for status, count in statuses.items()]
        print_table(("", "measured"), rows, title=args.url)
    return {"summary": summary, "statuses": statuses}
