"""Writes the examples as notebooks, beside themselves, with what their cells print and draw: minutes on one core."""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = os.environ.get("GITHUB_REPOSITORY")  # such as ACCOUNT/elit: adds a badge that opens the notebook there
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
BADGE += "(https://colab.research.google.com/github/{}/blob/main/examples/{}.ipynb)"
INSTALL = "Needs `pip install .` in a clone of the repository; nothing is downloaded."
# The last cell of each: a plot of what `main` has left.
PLOTS = {
    "own_transformer": """
import matplotlib.pyplot as plt

budgets = range(1, 17)  # of the network with the interface, which was trained last
plt.figure(figsize=(5, 3), dpi=70)
plt.plot(budgets, [loss(model, x[1500:], y[1500:], budget, -1).item() for budget in budgets], "o-")
plt.xlabel("latents a window")
plt.ylabel("loss on held-out digits")""",
    "train_loop": """
import matplotlib.pyplot as plt

plt.figure(figsize=(7, 3), dpi=70)
plt.imshow(torch.cat(pictures), cmap="gray")
plt.yticks([4, 12, 20, 28], ["16 latents", "8", "4", "1"])
plt.xticks([])""",
    "pipeline_dial": """
import matplotlib.pyplot as plt

plt.figure(figsize=(5, 3), dpi=70)
shares = [100 * budget for budget in before]
plt.plot(shares, list(before.values()), "o-", label="before")
plt.plot(shares, [(draw(budget) - original).std() for budget in before], "o-", label="distilled")
plt.xlabel("% of the tokens")
plt.ylabel("distance to the original")
plt.legend()""",
}
BOXED = """
model = elit.load_model("fashion")  # the model in the box: 32×32 pictures of clothes
rows = [elit.sample(model, list(range(10)), steps=8, budget=budget, seed=0) for budget in ("100%", "25%", "1")]
plt.figure(figsize=(7, 2.4), dpi=70)
plt.imshow(torch.cat([torch.cat(list(row[:, 0]), 1) for row in rows]), cmap="gray")
plt.yticks([16, 48, 80], ["100%", "25%", "1 latent"])
plt.xticks([])"""


def code_cells(name: str) -> list[str]:
    """The example's imports and functions, then the body of `main` with its defaults, then a plot."""
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source).body
    main = next(node for node in tree if isinstance(node, ast.FunctionDef) and node.name == "main")
    settings = zip(main.args.args, main.args.defaults, strict=True)
    body = [f"{each.arg} = {ast.unparse(value)}" for each, value in settings]
    body += textwrap.dedent("\n".join(lines[main.body[0].lineno - 1 : main.end_lineno])).splitlines()
    above = "\n".join(lines[tree[0].end_lineno : main.lineno - 1])
    plots = [PLOTS[name]] + [BOXED] * (name == "train_loop")
    return [each.strip() for each in (above, "\n".join(body), *plots)]


def run(cell: str, names: dict) -> list[dict]:
    """The outputs of a cell: what it prints, and the figure it draws."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    printed, picture = io.StringIO(), io.BytesIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(cell, "cell", "exec"), names)
    outputs: list[dict] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if plt.get_fignums():
        plt.savefig(picture, format="png", bbox_inches="tight")
        plt.close("all")
        data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    return outputs


def notebook(name: str) -> dict:
    title = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8")))
    badge = f"{BADGE.format(REPOSITORY, name)}\n\n" if REPOSITORY else ""
    text = f"# {name}\n\n{badge}{title}\n\n{INSTALL}"
    cells: list[dict] = [{"cell_type": "markdown", "id": "text", "metadata": {}, "source": text}]
    names: dict = {}
    for number, source in enumerate(code_cells(name)):
        cell = {"cell_type": "code", "id": f"code{number}", "metadata": {}, "execution_count": number + 1}
        cells.append(cell | {"source": source, "outputs": run(source, names)})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for name in sys.argv[1:] or PLOTS:
        text = json.dumps(notebook(name), indent=1, ensure_ascii=False) + "\n"
        (HERE / f"{name}.ipynb").write_text(text, encoding="utf-8")
