"""The page in a real browser: headless Chromium by Playwright, against a small network in this process."""

import re
import shutil
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from conftest import SIZES
from serve.service import saved_model, served

from elit.arguments import free_port
from elit.cli.main import main
from elit.models.presets import create_model
from elit.play.engine import NetworkEngine
from elit.play.server import make_app, quiet_gradio
from elit.play.service import LoadMonitor, ServiceClient
from elit.serve.measure import load_replica
from elit.serve.settings import ServiceSettings

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(not find_spec("gradio"), reason="needs the extra ui: pip install 'elit-diffusion[ui]'"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium"),
    pytest.mark.slow,
]

KEY = "a-key-of-tests"
NAMES = ["Trouser", "Pullover", "Bag", "Sneaker", "Ankle boot"]
SLOW = 99
"""A seed whose steps take long, so that there is time to cancel."""
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
LONG = 60_000


class SlowAtTimes(NetworkEngine):
    def generate(self, settings, tick=None, stop=None):
        def slow(done, total):
            time.sleep(0.2 if settings.seed == SLOW else 0)
            if tick:
                tick(done, total)

        return super().generate(settings, slow, stop)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    import uvicorn

    quiet_gradio()
    from elit.play.opening import Opening
    from elit.play.page import build_page

    torch.manual_seed(0)
    sizes = SIZES | {"in_channels": 3, "num_classes": 5, "split": (1, 2, 1), "window": (4, 4), "class_names": NAMES}
    model = create_model("ELIT-DiT-S/2", **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("page") / "model"
    model.save_pretrained(folder)
    engine = SlowAtTimes.load(str(folder), vae=None, device="cpu", dtype="float32")
    port = free_port("127.0.0.1", 0)
    digits = saved_model(tmp_path_factory.mktemp("watched") / "digits")
    settings = ServiceSettings(model=str(digits), name="digits", steps=4, max_batch=2, deadline_ms=60_000, threads=1)
    with served(settings, KEY, load_replica(settings)) as (url, _, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr("elit.play.service.CALM_BEFORE", 1)
        patch.setattr("elit.play.service.CALM_AFTER", 1)
        app = make_app(build_page(Opening(engine), LoadMonitor(ServiceClient(url, KEY))), "127.0.0.1")
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
        server.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


class Visitor:
    """A browser of its own, with what it asked for."""

    def __init__(self, browser, address, query="?steps=2"):
        self.context = browser.new_context(accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(address + query)
        self.page.wait_for_selector("#picture img")
        self.wait("GFLOPs", "#cost")

    def text(self, where):
        return self.page.locator(where).inner_text()

    def wait(self, words, where):
        script = "([where, words]) => document.querySelector(where)?.innerText.includes(words)"
        self.page.wait_for_function(script, arg=[where, words])

    def set(self, where, value):
        box = self.page.locator(f"{where} input[type=number]")
        box.fill(str(value))
        box.press("Enter")

    def open(self, tab):
        self.page.get_by_role("tab", name=tab).click()

    def source(self):
        return self.page.locator("#picture img").get_attribute("src")

    @property
    def gflops(self):
        return float(re.search(r"([\d.]+) GFLOPs", self.text("#cost"))[1])


@pytest.fixture(scope="module")
def visitor(browser, address):
    guest = Visitor(browser, address)
    yield guest
    guest.context.close()


def test_turning_the_budget_gives_another_picture_for_less(visitor):
    before, gflops = visitor.source(), visitor.gflops
    assert "budget 16" in visitor.text("#facts")
    visitor.set("#budget", 2)
    visitor.wait("budget 2 ·", "#facts")
    assert visitor.source() != before
    assert visitor.gflops < 0.8 * gflops
    visitor.page.wait_for_url("**budget=2**")


def test_a_download_is_made_again_byte_for_byte(visitor, tmp_path):
    with visitor.page.expect_download() as download:
        visitor.page.locator("#download").click()
    download.value.save_as(tmp_path / "a.png")
    assert main(["sample", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_compare(visitor):
    visitor.open("Compare")
    visitor.page.locator("#compare").click()
    visitor.wait("16 of 16", "#compared")
    visitor.page.wait_for_selector("#slider img")
    visitor.page.wait_for_selector("#apart img")
    assert "4 of 16" in visitor.text("#compared")
    visitor.page.locator("#strip").click()
    visitor.page.wait_for_function("document.querySelectorAll('#every img').length == 16")


def test_inspect_a_latent(visitor):
    visitor.open("Inside")
    visitor.page.locator("#look").click()
    visitor.wait("Latent 1 of 2", "#looked")
    first = visitor.page.locator("#overlay img").get_attribute("src")
    visitor.set("#latent", 2)
    visitor.wait("Latent 2 of 2", "#looked")
    assert visitor.page.locator("#overlay img").get_attribute("src") != first
    assert visitor.page.locator("#frames img").count() == 3
    visitor.page.locator("#matter").click()
    visitor.page.wait_for_selector("#bars svg .bar")


def test_plan_by_target(visitor):
    visitor.open("Plane")
    assert "no sweep.jsonl" in visitor.text("#plane")
    visitor.page.locator("#target input").fill("1")
    visitor.page.locator("#plan").click()
    visitor.wait("asked: target_gflops=1", "#planned")
    visitor.page.wait_for_function("Number(document.querySelector('#cost b').innerText.split(' ')[0]) <= 1")
    visitor.page.locator("#target input").fill("0.000001")
    visitor.page.locator("#plan").click()
    visitor.page.get_by_text("the least possible here").first.wait_for()


def test_a_burst_is_sent_and_the_budget_served_is_a_line(visitor):
    visitor.open("Load")
    visitor.page.wait_for_function("document.querySelectorAll('#load svg').length == 3")
    assert not visitor.page.locator("#load svg").nth(1).locator("polyline").count()
    visitor.set("#requests", 12)
    visitor.set("#seconds", 1)
    visitor.page.locator("#burst").click()
    visitor.wait("served, with", "#burst-words")
    visitor.page.wait_for_function(
        "document.querySelectorAll('#load svg')[1].querySelector('circle, polyline') != null"
    )


def test_a_wrong_class_is_a_clear_message(visitor):
    visitor.open("Dial")
    box = visitor.page.get_by_label("Class").first
    box.fill("boots")
    box.press("Enter")
    visitor.wait("no such class; did you mean 'Ankle boot'?", "#cost")
    visitor.page.locator("#draw").click()
    visitor.wait("no such class", "#facts")
    box.fill("Bag")
    box.press("Enter")
    visitor.wait("Bag · seed 0", "#facts")


def test_nothing_comes_from_another_host(visitor, address):
    assert visitor.hosts == {address.split("/")[2]}
    assert not [line for line in visitor.errors if "Content Security Policy" in line]


def test_two_browsers_keep_their_own_settings_and_cancel_works(browser, address):
    one = Visitor(browser, address, "?of=Sneaker&seed=5&steps=64&budget=4@0-0.5,16@0.5-1")
    other = Visitor(browser, address, "?of=Bag&seed=7&steps=3&budget=8&guidance=ccfg&scale=2")
    try:
        assert "Sneaker · seed 5 · budget 4@0-0.5,16@0.5-1" in one.text("#facts")
        assert "Bag · seed 7 · budget 8" in other.text("#facts")
        one.set("#seed", SLOW)
        one.page.locator(".progress-text, .progress-level").first.wait_for()
        begin = time.monotonic()
        one.page.locator("#cancel").click()
        other.set("#budget", 1)  # waits for the network until the other's run is gone
        other.wait("budget 1 ·", "#facts")
        assert time.monotonic() - begin < 10  # of 13 seconds
        assert "seed 5" in one.text("#facts")
        assert "seed 7" in other.text("#facts")
    finally:
        one.context.close()
        other.context.close()


def test_files_are_out_of_reach(address):
    import httpx

    for path in ("gradio_api/file=/etc/passwd", "gradio_api/file=pyproject.toml", "gradio_api/proxy=http://localhost/"):
        assert httpx.get(address + path).status_code in (403, 404)
    assert httpx.post(address + "gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    assert "font-src 'self'" in httpx.get(address).headers["content-security-policy"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("play --host 0.0.0.0", "host='0.0.0.0': the page has no password"),
        ("play --port 99999", "port=99999: give 0 to 65535"),
        ("play nowhere", "model='nowhere': no such folder"),
    ],
)
def test_the_command_refuses(line, message, capsys):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_named(address, capsys):
    port = address.split(":")[2].strip("/")
    assert main(["play", "--port", port]) == 2
    assert f"port={port}: Address already in use" in capsys.readouterr().err
