"""Requests of other clients: bodies of vLLM-Omni's and SGLang's, OpenAI's older names, browsers, probes."""

import asyncio
import json
import time

import httpx
import pytest
from ray.exceptions import RayError
from service import saved_model, served

from elit.cli.main import main
from elit.serve.requests import ApiError, read_request
from elit.serve.server import start_ray
from elit.serve.settings import ServiceSettings

ABOUT = {"guidance_scale": 1.0, "budgets": [1, 2, 3, 4], "guides": True, "size": [64, 64], "multiple": 8, "text": True}
ABOUT |= {"classes": 0, "class_names": [], "negative_prompt": True}
SERVICE = ServiceSettings(model="runs/digits", name="digits", steps=6)
OMNI = {"model": "default", "prompt": "3", "n": 1, "size": "8x8", "response_format": "b64_json", "seed": 7}
OMNI |= {"num_inference_steps": 2, "guidance_scale": 1.0, "generator_device": "cpu", "output_compression": 100}
OMNI |= {"return_stage_metrics": True, "extra_params": {"budget": 2, "deadline_ms": 60_000}, "user": "bench"}
SGLANG = {"prompt": "3", "n": 1, "response_format": "b64_json", "size": "8x8", "diffusers_kwargs": {"budget": 0.25}}


def read(service=SERVICE, **body):
    return read_request(json.dumps({"prompt": "3"} | body).encode(), service, ABOUT, 0.0)


@pytest.mark.parametrize(
    ("body", "size", "budget", "ignored"),
    [
        ({"extra_params": {"budget": 2}}, None, 2, ()),
        ({"extra_params": {"budget": 2, "cfg_rescale": 1, "deadline_ms": None}}, None, 2, ("cfg_rescale",)),
        ({"extra_params": {"budget": 2}, "diffusers_kwargs": {"budget": 3}, "budget": 4}, None, 4, ()),
        ({"width": 32, "height": 16, "budget": 1}, (32, 16), 1, ()),
        ({"width": 32, "height": 16, "size": "32x16", "budget": 1}, (32, 16), 1, ()),
        ({"width": 64, "height": 64, "budget": 1}, None, 1, ()),
        ({"model": "default", "quality": "hd", "bot_task": "think"}, None, 4, ("bot_task",)),
    ],
)
def test_other_engines_parameters(body, size, budget, ignored):
    request = read(**body)
    assert (request.size, [rung.budget for rung in request.settings], request.ignored) == (size, [budget], ignored)


def test_older_names_of_quality_and_true_guidance():
    assert read(quality="standard").settings == read().settings
    assert read(quality="hd").settings == read(quality="high").settings
    guided = read(true_cfg_scale=4.0, guidance_scale=1.0)
    assert (guided.settings, guided.ignored) == (read(guidance_scale=4.0).settings, ("guidance_scale",))
    assert read(true_cfg_scale=4, guidance_scale=4, n=10).ignored == ()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"width": 32}, "height must be given beside the other side"),
        ({"width": 32, "height": 32, "size": "16x16"}, "size must be 32x32, as width and height"),
        ({"extra_params": [1]}, "extra_params: "),
        ({"extra_params": {"budget": 9}}, "budget must be"),
        ({"true_cfg_scale": -1}, "true_cfg_scale: "),
        ({"model": "another"}, "model: 'another' is not served here"),
        ({"n": 11}, "n must be at most 10, got 11"),
    ],
)
def test_what_they_may_not_send(body, message):
    with pytest.raises(ApiError) as refused:
        read(**body)
    assert refused.value.message.startswith(message)


@pytest.mark.parametrize("body", [{"bot_task": "x"}, {"extra_params": {"budgte": 2}}, {"diffusers_kwargs": {"x": 1}}])
def test_a_strict_service_refuses_what_has_no_meaning(body):
    with pytest.raises(ApiError, match="no such parameter"):
        read(ServiceSettings(model="digits", strict=True), **body)
    assert read(**body).ignored


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = saved_model(tmp_path_factory.mktemp("clients") / "digits")
    service = ServiceSettings(model=folder, name="digits", steps=4, max_batch=2, deadline_ms=60_000, threads=1)
    with served(service) as running:
        yield running


def test_bench_bodies_are_answered(url):
    model = httpx.get(f"{url[0]}/v1/model_info").json()["model_path"]
    for body, budget in ((OMNI, 2), (SGLANG | {"model": model}, 1)):
        answer = httpx.post(f"{url[0]}/v1/images/generations", json=body, timeout=60).json()
        report, stages = answer["elit"], answer.get("metrics", {}).get("stage_durations")
        assert (report["budget"], answer["usage"]["total_tokens"], bool(stages)) == (budget, 0, body is OMNI)
        if stages:
            assert list(stages) == ["queue_ms", "begin_ms", "steps_ms", "pictures_ms"]
            assert sum(stages.values()) == pytest.approx(report["queue_ms"] + report["compute_ms"])


def test_paths_and_methods_that_are_not_there(url):
    for kind in ("edits", "variations"):
        answer = httpx.post(f"{url[0]}/v1/images/{kind}", files={"image": b"x"}, data={"prompt": "3"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"].startswith(f"images/{kind}: this model makes images of prompts alone")
    for method, path, allowed in (("PUT", "/health", "GET"), ("GET", "/v1/images/generations", "POST")):
        answer = httpx.request(method, url[0] + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    for path in ("/health", "/v1/models", "/metrics"):
        answer = httpx.head(url[0] + path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers.get("content-length", 1)) > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "LOCALHOST:99"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ],
)
def test_pages_of_other_sites_have_no_access_to_a_service_without_a_key(url, headers, status):
    assert httpx.get(f"{url[0]}/v1/models", headers=headers).status_code == status
    assert httpx.get(f"{url[0]}/health", headers=headers).status_code == 200


def test_the_openapi_document_has_paths_bodies_and_every_status(url):
    document = httpx.get(f"{url[0]}/openapi.json").json()
    post = document["paths"]["/v1/images/generations"]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "budget", "extra_params", "true_cfg_scale"} <= set(schema["properties"])
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(post["responses"])
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    names = [each["operationId"] for path in document["paths"].values() for each in path.values()]
    assert len(names) == len(set(names))


def test_a_refused_stream_has_its_status(url):
    body = {"prompt": "3", "stream": True, "num_inference_steps": 100, "n": 10, "deadline_ms": 20}
    assert httpx.post(f"{url[0]}/v1/images/generations", json=body).status_code in (400, 429)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_counted_as_gone_and_frees_its_place(url, stream, caplog):
    address, replica, app = url
    count = app.state.metrics.registry.get_sample_value
    before = count("elit_requests_total", {"status": "499"}) or 0
    body = {"prompt": "3", "n": 10, "num_inference_steps": 100, "stream": stream}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/images/generations", json=body, timeout=0.4)
    end = time.monotonic() + 20
    while replica.here or not (count("elit_requests_total", {"status": "499"}) or 0) > before:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert count("elit_requests_total", {"status": "500"}) is None
    assert app.state.metrics.unanswered() == 0
    assert not caplog.records


def test_probes_say_within_a_second_that_no_replica_answers(url, monkeypatch):
    async def never():
        await asyncio.sleep(60)

    async def dead():
        raise RuntimeError("secret")

    for backend in (never, dead):
        monkeypatch.setattr(url[1], "alive", backend)
        for path in ("/health", "/ready"):
            start = time.monotonic()
            answer = httpx.get(url[0] + path)
            assert (answer.status_code, time.monotonic() - start < 2, "secret" in answer.text) == (503, True, False)
    monkeypatch.undo()
    assert httpx.get(f"{url[0]}/ready").status_code == 200


def test_queues_are_empty_at_idle_and_a_dead_replica_has_none(url):
    metrics = url[2].state.metrics
    metrics.queue.labels("a").set(30)
    with metrics.request():
        assert 'elit_queue_length{replica="a"} 30.0' in metrics.text().decode()
    assert 'elit_queue_length{replica="a"} 0.0' in httpx.get(f"{url[0]}/metrics").text


def test_a_service_on_this_machine_joins_no_other_cluster(monkeypatch):
    given = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.init", lambda **options: given.append(options["address"]))
    for address in (None, "auto"):
        start_ray(ServiceSettings(model="digits", address=address), {})
    assert given == ["local", "auto"]


def test_a_service_that_does_not_start_shows_its_own_cause(monkeypatch, capsys):
    def fails(**options):
        raise RayError("the proxy died\nwith a long trace")

    monkeypatch.setattr("elit.serve.server.start_ray", lambda *given: None)
    monkeypatch.setattr("ray.serve.start", fails)
    assert main(["serve", "fashion", "--address", "auto", "--steps", "4"]) == 1
    assert capsys.readouterr().err == "elit serve: Ray Serve did not start: the proxy died\n"
