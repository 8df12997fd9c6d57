"""The API over real HTTP: OpenAI's client, bytes equal to elit sample's, limits, errors, streams, metrics, leaving."""

import base64
import io
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from service import saved_model, served

from elit.cli.main import main
from elit.serve.settings import ServiceSettings

pytestmark = pytest.mark.slow

KEY = "a-key-of-tests"
HEAD = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("serve") / "digits")


@pytest.fixture(scope="module")
def service(folder):
    settings = ServiceSettings(model=str(folder), name="digits", steps=6, max_batch=4, deadline_ms=60_000, threads=1)
    with served(settings, KEY) as (url, replica, app):
        yield url, replica, app


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service[0]}/v1", api_key=KEY, max_retries=0)


def ask(url, body, key=KEY):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{url}/v1/images/generations", content=content, headers=headers, timeout=60)


def get(url, path, key=KEY):
    return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=60)


def sampled(folder, out, label, seed, served):
    line = f"sample {folder} --labels {label} --count 1 --seed {seed} --out {out}"
    line += f" --steps {served['steps']} --budget {served['budget']}"
    if guidance := served["guidance"]:
        line += f" --guidance {'ccfg' if guidance['budget'] else 'cfg'} --scale {guidance['scale']}"
        line += f" --guidance-budget {guidance['budget']}" if guidance["budget"] else ""
    assert main(line.split()) == 0
    return pixels((out / "000000.png").read_bytes())


def pixels(content):
    """Size and bytes of a picture; elit sample's files also say how they were made."""
    image = Image.open(io.BytesIO(content))
    return image.size, image.mode, image.tobytes()


def test_openai_client_gets_the_bytes_of_elit_sample_alone_and_in_a_mixed_batch(client, folder, tmp_path):
    wanted = [
        {"seed": 1, "budget": 1},
        {"seed": 2, "budget": 4},
        {"seed": 3, "budget": "50%", "guidance_scale": 2.0, "guidance_budget": 1},
        {"seed": 4, "budget": 4, "guidance_scale": 1.5, "num_inference_steps": 4},
        {"seed": 5},
    ]

    def generate(extra):
        answer = client.images.generate(prompt="three", model="digits", extra_body=extra)
        return answer.data[0].b64_json, answer.model_extra["elit"]

    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(generate, wanted))
    for extra, (image, report) in zip(wanted, together, strict=True):
        expected = sampled(folder, tmp_path / str(extra["seed"]), 3, extra["seed"], report)
        assert pixels(base64.b64decode(image)) == expected
        assert min(report["gflops"], report["compute_ms"]) > 0 <= report["queue_ms"]
    assert [report["budget"] for _, report in together[:4]] == [1, 4, 2, 4]
    assert generate(wanted[0])[0] == together[0][0]


def test_n_images_urls_formats_and_names(client):
    answer = client.images.generate(prompt="Ankle Boot", n=3, response_format="url", output_format="webp", size="8x8")
    assert len({image.url for image in answer.data}) == 3
    assert all(image.url.startswith("data:image/webp;base64,") for image in answer.data)
    high = client.images.generate(prompt="9", quality="high").model_extra["elit"]
    assert (high["budget"], high["steps"]) == (4, 6)
    assert client.images.generate(prompt="9", quality="low").model_extra["elit"]["budget"] < 4
    assert [model.id for model in client.models.list()] == ["digits"]
    assert client.models.retrieve("digits").model_extra["elit"]["budgets"] == [1, 2, 3, 4]


def test_previews_stream(client):
    events = list(client.images.generate(prompt="3", stream=True, partial_images=2, extra_body={"seed": 1}))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    how = {"seed": 1, "budget": events[-1].elit["budget"], "num_inference_steps": events[-1].elit["steps"]}
    assert events[0].b64_json != events[1].b64_json
    assert events[-1].b64_json == client.images.generate(prompt="3", extra_body=how).data[0].b64_json


def test_what_cannot_be_met_is_refused_at_once_and_without_the_key_there_is_nothing(client, service):
    for milliseconds in (0.5, 3):
        with pytest.raises(openai.BadRequestError, match=r"deadline_ms must be \d+ or more") as refused:
            client.images.generate(prompt="3", extra_body={"deadline_ms": milliseconds})
        assert "Retry-After" not in refused.value.response.headers  # it would never work
    url = service[0]
    for key in (None, "", "wrong", KEY + "x"):
        answers = [get(url, path, key) for path in ("/v1/models", "/metrics", "/nothing")]
        assert {each.status_code for each in (*answers, ask(url, {"prompt": "3"}, key))} == {401}
    assert get(url, "/health", None).status_code == get(url, "/ready", None).status_code == 200
    assert get(url, "/nothing").status_code == 404


BAD = [
    *({}, [], {"prompt": "3" * 100_000}, {"prompt": "no such class"}, {"prompt": "3", "num_inference_steps": 101}),
    *({"prompt": "3", "budget": 4, "quality": "low"}, b"", b"\xff\xfe", b"[" * 50_000, b'{"prompt": NaN}'),
]


def test_malformed_requests_are_4xx_with_one_json_error_each(service):
    url, replica, _ = service
    for body in BAD:
        answer = ask(url, body)
        message = answer.json()["error"]["message"]
        assert 400 <= answer.status_code < 500, (str(body)[:80], message)
        assert 0 < len(message.strip()) < 500
        assert "\n" not in message
    assert not replica.here


def test_half_open_connections_and_bodies_that_never_come_hold_nothing_up(service, monkeypatch):
    monkeypatch.setattr("elit.serve.api.BODY_SECONDS", 1.0)
    url = service[0]
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        *silent, slow = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(51)]
        for number, each in enumerate(silent):
            each.sendall((HEAD if number % 2 else "POST /v1/im").encode())
        slow.settimeout(20)
        slow.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
        assert ask(url, {"prompt": "3"}).status_code == 200
        assert b" 408 " in slow.recv(4096)
        assert ask(url, b"x" * 70_000).status_code == 413


def test_metrics_parse_and_count(client, service):
    client.images.generate(prompt="3", extra_body={"budget": 2})
    text = get(service[0], "/metrics").text
    families = {family.name: family.samples for family in text_string_to_metric_families(text)}
    names = "requests rejections images latency_seconds queue_wait_seconds batch_images queue_length deadlines"
    assert {f"elit_{name}" for name in names.split()} <= set(families)
    images = {tuple(each.labels.values()): each.value for each in families["elit_images"] if "budget" in each.labels}
    assert images["2", "6"] >= 1
    assert families["elit_in_flight"][0].value == 0


def test_a_draining_service_takes_no_more(service):
    url, _, app = service
    app.state.draining = True
    try:
        answer = ask(url, {"prompt": "3"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert "retry-after" in answer.headers
        assert get(url, "/ready").status_code == 503
    finally:
        app.state.draining = False


def test_a_failing_engine_is_an_error_without_a_trace(service, monkeypatch):
    url, replica, _ = service

    def fail(running):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(replica.engine, "step", fail)
        answer = ask(url, {"prompt": "3"})
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    assert ask(url, {"prompt": "3"}).status_code == 200
