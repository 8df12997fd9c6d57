"""elit recipes"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elit.cli.main import parse as parse_arguments
from elit.config import TrainConfig, load_config, recipes


@dataclass(frozen=True, kw_only=True)
class Args:
    """The training runs that come with the package: settings for elit train --config recipe:NAME. By default all are
    listed with their first lines.

    Example: elit recipes
    """

    json: bool = False
    """Print the recipes as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    return parse_arguments(Args, "recipes", arguments)


def run(args: Args) -> list[dict[str, Any]]:
    from elit.evaluate.report.tables import print_table

    rows = []
    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        config: TrainConfig = load_config(path)
        rows.append(
            {
                "config": f"recipe:{name}",
                "about": first.lstrip("# ") if first.startswith("#") else "",
                "model": config.model.name,
                "steps": config.steps,
                "batch_size": config.batch_size,
            }
        )
    if not args.json:
        print_table(["--config", "what it is", "steps", "batch"], [[str(row[key]) for key in COLUMNS] for row in rows])
        print("Use one: elit train --config recipe:NAME --data FOLDER; with --dry-run it says what the run takes.")
    return rows


COLUMNS = ("config", "about", "steps", "batch_size")
