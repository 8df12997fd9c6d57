"""The screenshot of the playground's guide, docs/figures/playground.png, taken in headless Chromium.

    python studies/playground.py

Needs playwright and a Chromium, such as Debian's package.
"""

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elit.play.page import make_app, open_page

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
HEIGHT = 900
TIMEOUT_MS = 180_000


def parse(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--query", default="of=sneaker&seed=3&budget=4", help="link that is opened")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder")
    return parser.parse_args(line)


def serve(page: Any) -> str:
    """The page's address; it ends with this process."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(make_app(page, "127.0.0.1"), port=0, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"


def main(line: Sequence[str] | None = None) -> int:
    args = parse(line)
    from playwright.sync_api import sync_playwright

    address = serve(open_page(args.model, vae=None, device="cpu", dtype="float32"))
    dark = "&__theme=dark" if args.scheme == "dark" else ""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": args.width, "height": HEIGHT}
        page = browser.new_context(viewport=size, color_scheme=args.scheme).new_page()
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(f"{address}?{args.query}{dark}")
        page.wait_for_selector("#picture img")
        page.wait_for_selector("#thumbnails img")
        page.wait_for_function("document.querySelector('#cost').innerText.includes('measured')")
        page.wait_for_timeout(500)
        page.screenshot(path=args.out / "playground.png", full_page=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
