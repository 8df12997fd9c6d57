"""The pictures of the playground's guide, taken in headless Chromium.

    python studies/playground.py                                       # docs/figures/playground.png
    elit serve fashion --steps 6 &
    python studies/playground.py --service http://127.0.0.1:8000       # playground-load.png as well

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

from elit.arguments import free_port
from elit.play.server import make_app, quiet_gradio

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
WIDTH, HEIGHT = 1180, 900
PATIENCE = 180_000
"""Milliseconds."""


def parse(line: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--service", help="URL of a service of elit serve: the Load tab under a burst")
    parser.add_argument("--key", help="of the service")
    parser.add_argument("--query", default="of=sneaker&seed=3&budget=4", help="where the dial stands")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder")
    return parser.parse_args(line)


def serve(page: Any) -> str:
    """The page's address; it ends with this process."""
    import uvicorn

    port = free_port("127.0.0.1", 0)
    config = uvicorn.Config(make_app(page, "127.0.0.1"), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return f"http://127.0.0.1:{port}/"


def main(line: Sequence[str] | None = None) -> int:
    args = parse(line)
    quiet_gradio()
    from playwright.sync_api import sync_playwright

    from elit.play.engine import NetworkEngine
    from elit.play.opening import Opening
    from elit.play.page import build_page
    from elit.play.service import LoadMonitor, ServiceClient

    engine = NetworkEngine.load(args.model, vae=None, device="cpu", dtype="float32")
    monitor = LoadMonitor(ServiceClient(args.service, args.key)) if args.service else None
    address = serve(build_page(Opening(engine), monitor))
    dark = "&__theme=dark" if args.scheme == "dark" else ""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": args.width, "height": HEIGHT}
        page = browser.new_context(viewport=size, color_scheme=args.scheme).new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{address}?{args.query}{dark}")
        page.wait_for_selector("#picture img")
        page.wait_for_selector("#thumbnails img")
        page.wait_for_function("document.querySelector('#cost').innerText.includes('measured')")
        page.wait_for_timeout(500)
        page.screenshot(path=args.out / "playground.png", full_page=True)
        if monitor is not None:
            if page.get_by_role("tab", name="Load").count() == 0:  # a narrow page has it in a menu
                page.locator(".overflow-menu > button").click()
                page.get_by_role("button", name="Load", exact=True).click()
            else:
                page.get_by_role("tab", name="Load").click()
            page.locator("#burst").click()
            page.wait_for_function("document.querySelector('#burst-words')?.innerText.includes('served')")
            page.wait_for_timeout(1500)
            page.screenshot(path=args.out / "playground-load.png", full_page=True)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
