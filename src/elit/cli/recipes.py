"""elit recipes"""

from dataclasses import dataclass

from elit.cli.main import Command
from elit.config import load_config, recipes
from elit.evaluate.tables import print_table


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """List the training recipes in the package: settings for elit train --config recipe:NAME.

    Example: elit recipes
    """


def run(args: Args) -> list[dict[str, str | int]]:
    rows: list[dict[str, str | int]] = []
    for name, path in recipes().items():
        first, config = path.read_text(encoding="utf-8").partition("\n")[0], load_config(path)
        row = {"config": f"recipe:{name}", "about": first.lstrip("# ") if first.startswith("#") else ""}
        rows.append(row | {"model": config.model.name, "steps": config.steps, "batch_size": config.batch_size})
    if not args.json:
        columns = ("config", "about", "steps", "batch_size")
        print_table(["--config", "description", "steps", "batch"], [[str(row[key]) for key in columns] for row in rows])
        print("Use one: elit train --config recipe:NAME --data FOLDER; --dry-run prints what the run will take.")
    return rows
