"""Tables for the terminal and for cards; the model card of an add-on, and its way to the hub."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elit.config import DistillConfig
from elit.files import Json, replacing, write_text

FILES = ["README.md", "elastic.json", "elastic.safetensors", "samples.png", "transformer/*"]  # uploaded to the hub


def template(name: str) -> Template:
    """A text with $names, a file beside this one."""
    return Template(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Prints to stdout, numbers aligned right; as wide as necessary where stdout is not a terminal."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column, heading in enumerate(headings):
        numeric = all(row[column][:1].isdigit() or row[column] in ("", "-") for row in rows)
        table.add_column(escape(heading), justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_card(config: DistillConfig, table: list[Json] | None) -> None:
    """Writes README.md into the run's folder: how to use the add-on, and what validation measured last."""
    out = Path(config.out)
    pictures = sorted((out / "samples").glob("step-*.png"))
    if pictures:
        with replacing(out / "samples.png") as temporary:
            temporary.write_bytes(pictures[-1].read_bytes())
    size = sum(path.stat().st_size for path in out.glob("elastic.safetensors")) / 1e6
    low_rank = f"the interface and low-rank changes (rank {config.lora_rank})"
    trained = {"lora": low_rank, "interface": "the interface", "all": "all weights"}[config.weights]
    source = "pictures and beside the original" if config.data else "trajectories that the original drew itself"
    picture = "![The original's samples, then a row for each budget](samples.png)\n\n" if pictures else ""
    original = "Outside of `elit.budget`, and at full budget, the original runs, to the bit."
    values = {"pipeline": config.pipeline, "name": Path(config.pipeline).name, "out": config.out, "size": f"{size:.1f}"}
    values |= {"trained": trained, "steps": f"{config.steps:,}", "batch": config.batch_size, "source": source}
    values |= {"original": original if config.weights != "all" else "", "picture": picture, "table": _table(table)}
    write_text(out / "README.md", template("add_on.md").substitute(values))


def _table(table: list[Json] | None) -> str:
    if not table:
        return "No validation was run (preview_every = 0)."
    columns = {
        "tokens": ("tokens of a window", ""),
        "share": ("share", ".1%"),
        "gflops": ("GFLOPs a forward", ".4g"),
        "ms": ("ms a forward", ".4g"),
        "faster": ("faster", ".2f"),
        "distance": ("distance of the prediction", ".4f"),
        "picture_distance": ("distance of the picture", ".4f"),
        "picture_distance_ccfg": ("the same with CCFG", ".4f"),
    }
    columns = {name: column for name, column in columns.items() if name in table[0]}
    rows = [[format(row[name], form) for name, (_, form) in columns.items()] for row in table]
    note = "Distances to the original are root mean squares: of the prediction, and of pixels in [0, 1]. "
    note += "GFLOPs are of the blocks, for one sample, and ms too, in batches, on the machine that trained."
    return f"{markdown_table([heading for heading, _ in columns.values()], rows)}\n\n{note}"


def push(folder: str, repository: str) -> str:
    """Uploads the add-on and its card; returns the repository's address. Raises ValueError where the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=FILES)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"push_to_hub={repository!r}: the hub refused ({reason}); {folder} is saved") from None
    return str(commit.repo_url)
