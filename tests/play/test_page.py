"""The page in headless Chromium, driven by Playwright, with a small network in this process."""

import shutil
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from conftest import opened

from elit.cli.main import main
from elit.elastic.engine import load_engine
from elit.play.renderer import Renderer
from elit.sampling.engine import NetworkEngine

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(not find_spec("gradio"), reason="needs the extra ui: pip install '.[ui]'"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium"),
    pytest.mark.slow,
]

NAMES = ["Trouser", "Pullover", "Bag", "Sneaker", "Ankle boot"]
SLOW, SLOW_STEPS = 99, []  # A seed whose steps take long, so that there is time to cancel; those that were done.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")


class SlowAtTimes(Renderer):
    def draw(self, request, tick=print):
        def slow(done, total):
            if request.sampling.seed == SLOW:
                SLOW_STEPS.append(done)
                time.sleep(1.5)
            tick(done, total)

        return super().draw(request, slow)


@contextmanager
def address_of(page):
    import uvicorn

    from elit.play.page import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(page, "127.0.0.1"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = server.force_exit = True  # browsers keep their connections open
    thread.join(20)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from elit.play.page import build_page

    folder = tmp_path_factory.mktemp("page") / "model"
    opened("elit-dit", in_channels=3, class_names=NAMES).save_pretrained(folder)
    renderer = SlowAtTimes(load_engine(str(folder), device="cpu", dtype="float32"), "float32")
    with address_of(build_page(renderer)) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


class Visitor:
    def __init__(self, browser, address, query="?steps=2"):
        self.page = browser.new_context(accept_downloads=True).new_page()
        self.page.set_default_timeout(60_000)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.goto(address + query)
        self.page.wait_for_selector("#picture img")
        self.wait("GFLOPs", "#cost")

    def text(self, where):
        return self.page.locator(where).inner_text()

    def wait(self, text, where):
        script = "([where, text]) => document.querySelector(where)?.innerText.includes(text)"
        self.page.wait_for_function(script, arg=[where, text])

    def set(self, where, value):
        self.enter(self.page.locator(f"{where} input[type=number]"), str(value))

    def enter(self, box, text):
        box.fill(text)
        box.press("Enter")

    def click(self, where):
        self.page.locator(where).click()

    def open(self, tab):
        self.page.get_by_role("tab", name=tab).click()

    def gflops(self):
        return float(self.page.locator("#cost b").first.inner_text().split()[0])

    def source(self, where="#picture"):
        return self.page.locator(f"{where} img").get_attribute("src")


@pytest.fixture(scope="module")
def visitor(browser, address):
    return Visitor(browser, address)


def test_a_smaller_budget_gives_another_picture_for_less(visitor):
    before, gflops = visitor.source(), visitor.gflops()
    assert "budget 16" in visitor.text("#facts")
    visitor.set("#budget", 2)
    visitor.wait("budget 2 ·", "#facts")
    visitor.wait("budget 2 of", "#cost")
    assert visitor.source() != before
    assert visitor.gflops() < 0.8 * gflops
    visitor.page.wait_for_url("**budget=2**")


def test_a_download_is_made_again_byte_for_byte(visitor, tmp_path):
    with visitor.page.expect_download() as download:
        visitor.click("#download")
    download.value.save_as(tmp_path / "a.png")
    assert main(["sample", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_compare(visitor):
    visitor.open("Compare")
    visitor.wait("budget 16", "#compared")
    for shown in ("#slider img", "#apart img"):
        visitor.page.wait_for_selector(shown)
    assert "budget 4" in visitor.text("#compared")
    visitor.click("#strip")
    visitor.page.wait_for_function("document.querySelectorAll('#every img').length == 16")


def test_inspect_a_latent(visitor):
    visitor.open("Inside")
    visitor.wait("Latent 1 of 2", "#looked")
    first = visitor.source("#overlay")
    visitor.set("#latent", 2)
    visitor.wait("Latent 2 of 2", "#looked")
    assert visitor.source("#overlay") != first
    assert visitor.page.locator("#frames img").count() == 3


def test_plan_by_target(visitor):
    visitor.open("Plane")
    assert "no sweep.jsonl" in visitor.text("#planned")
    visitor.page.locator("#target input").fill("1")
    visitor.click("#plan")
    visitor.wait("target_gflops=1", "#planned")
    visitor.page.wait_for_function("Number(document.querySelector('#cost b').innerText.split(' ')[0]) <= 1")
    visitor.page.locator("#target input").fill("0.000001")
    visitor.click("#plan")
    visitor.wait("least possible", "#planned")


def test_accessible_to_everybody(visitor):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    widths = set()
    for tab in ("Dial", "Compare", "Plane", "Inside"):
        visitor.open(tab)
        assert not visitor.page.locator(".empty[aria-label]:not([role])").count()  # frames with nothing in them yet
        widths.add(visitor.page.locator(".sides").bounding_box()["width"])
        visitor.page.wait_for_timeout(500)  # what is drawn again is pale until it is there
        visitor.page.wait_for_function("!document.querySelector('.pending, .generating, .progress-text')")
        visitor.page.wait_for_timeout(300)
        violations = axe.run(visitor.page).response["violations"]
        wrong = [each for each in violations if each["impact"] in ("serious", "critical")]
        assert not [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in wrong], tab
    assert len(widths) == 1  # no tab shifts the page


def test_invalid_values_are_a_message(visitor, address):
    visitor.open("Dial")
    box = visitor.page.get_by_label("Class").first
    visitor.enter(box, "boots")
    visitor.wait("did you mean 'Ankle boot'?", "#cost")
    visitor.click("#draw")
    visitor.wait("Ankle boot", "#facts")
    visitor.enter(box, "Bag")
    visitor.wait("Bag · seed 0", "#facts")
    visitor.set("#seed", -5)
    visitor.wait("seed must be 0 to", "#facts")
    visitor.set("#seed", 0)
    assert not visitor.page.locator(".error").count()
    assert visitor.hosts == {address.split("/")[2]}  # nothing comes from another host
    assert not [line for line in visitor.errors if "Content Security Policy" in line]


def test_two_browsers_keep_their_own_settings_and_cancel_works(browser, address):
    one = Visitor(browser, address, "?of=Sneaker&seed=5&steps=64&budget=4@0-0.5,16@0.5-1")
    other = Visitor(browser, address, "?of=Bag&seed=7&steps=3&budget=8&guidance=ccfg&scale=2")
    assert "Sneaker · seed 5 · budget 4@0-0.5,16@0.5-1" in one.text("#facts")
    assert "Bag · seed 7 · budget 8" in other.text("#facts")
    one.set("#seed", SLOW)
    one.page.locator(".progress-text, .progress-level").first.wait_for()
    one.click("#cancel")
    other.set("#budget", 1)  # waits for the network until the other's run is gone
    other.wait("budget 1 ·", "#facts")
    assert len(SLOW_STEPS) < 50  # of 64
    assert "seed 5" in one.text("#facts")
    assert "seed 7" in other.text("#facts")


def test_a_text_model_has_a_prompt(browser):
    from elit.play.page import build_page

    page = build_page(Renderer(NetworkEngine(opened("elit-mmdit", in_channels=3), name="texts")))
    with address_of(page) as address:
        guest = Visitor(browser, address, "?steps=1&budget=99")  # a budget that it has not
        guest.wait("budget must be a number of latents per window (1 to 16)", "body")
        guest.enter(guest.page.get_by_label("Prompt"), "a one")
        guest.wait("a one · seed 0 · budget 16", "#facts")
        guest.page.wait_for_url("**of=a+one**")


def test_the_boxed_model_opens_at_measured_settings_and_plans(browser):
    from elit.play.page import open_page

    with address_of(open_page(None, vae=None, device="cpu", dtype="float32")) as address:
        guest = Visitor(browser, address, "")
        assert "expected fd" in guest.text("#cost")
        guest.open("Plane")
        before = guest.page.wait_for_selector("#plane img").get_attribute("src")
        guest.page.locator("#target input").fill("5")
        guest.click("#plan")
        guest.wait("fd", "#planned")
        guest.page.wait_for_function("src => document.querySelector('#plane img').src != src", arg=before)


def test_files_are_out_of_reach(address):
    import httpx

    for path in ("gradio_api/file=/etc/passwd", "gradio_api/file=pyproject.toml", "gradio_api/proxy=http://localhost/"):
        assert httpx.get(address + path).status_code in (403, 404)
    assert httpx.post(address + "gradio_api/upload", files={"files": b"x"}).status_code == 404
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    assert "font-src 'self'" in httpx.get(address).headers["content-security-policy"]


def test_the_command_refuses(address, capsys):
    port = address.split(":")[2].strip("/")
    for line, message in (
        ("--host 0.0.0.0", "the page has no password"),
        (f"--port {port}", f"cannot listen at host='127.0.0.1', port={port}"),
        ("nowhere", "nowhere"),
    ):
        assert main(["play", *line.split()]) == 2
        assert message in capsys.readouterr().err
