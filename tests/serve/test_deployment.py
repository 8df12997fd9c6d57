"""Ray Serve itself, in a process of its own as a user starts it: one Ray for this file, on the loopback address."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
from service import PROFILE, saved_model

from elit.cli.main import free_port
from elit.serve.loadtest import arrivals, run_loadtest

pytestmark = pytest.mark.slow
START = 240.0
"""Seconds for Ray and the service: many times what an idle machine takes."""
DRAIN = 60


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = saved_model(tmp_path_factory.mktemp("ray") / "digits")
    profile = folder.parent / "profile.json"  # or each replica would measure for four seconds first
    profile.write_text(json.dumps(PROFILE))
    port = free_port("127.0.0.1", 0)
    options = f"--port {port} --steps 4 --json --deadline-ms 60000 --drain-seconds {DRAIN} --threads 1 --profile"
    options = f"--start-seconds {START} {options}"
    line = [sys.executable, "-m", "elit", "serve", str(folder), *options.split(), str(profile)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    said = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    end = time.monotonic() + START
    try:
        while not any("at http" in line for line in said):
            if time.monotonic() > end or process.poll() is not None:
                pytest.fail(f"elit serve did not start: {''.join(said)[-2000:]}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def models(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_an_image(service):
    answer = models(service[0]).images.generate(prompt="three", extra_body={"seed": 3, "budget": 2})
    assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")
    events = models(service[0]).images.generate(prompt="three", stream=True, partial_images=1, extra_body={"seed": 3})
    assert [event.type for event in events][-1] == "image_generation.completed"


def test_every_process_of_the_service_listens_on_this_machine_alone(service):
    addresses, process = [], psutil.Process(service[1].pid)
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            addresses += [(each.pid, one.laddr.ip) for one in each.net_connections("tcp") if one.status == "LISTEN"]
    assert len(addresses) > 5  # the proxy, GCS, raylet, workers
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not [each for each in addresses if each[1] not in loopback]


def test_a_replica_killed_in_a_burst_loses_no_request_and_comes_back(service):
    url = service[0]
    process = models(url).models.retrieve("digits").model_extra["elit"]["process"]
    times = arrivals([8.0] * 4, seed=1)
    killer = threading.Timer(1.5, os.kill, (process, signal.SIGKILL))
    killer.start()
    outcomes = run_loadtest(url, times, prompts=["3"], deadline_ms=60_000)
    killer.join()
    assert {each.status for each in outcomes} <= {200, 429, 503}
    end = time.monotonic() + START
    while (status := httpx.post(f"{url}/v1/images/generations", json={"prompt": "3"}, timeout=120).status_code) != 200:
        assert status in (429, 503)
        assert time.monotonic() < end
        time.sleep(0.5)


def test_sigterm_drains_within_the_limit(service):
    url, process = service
    pool, long = ThreadPoolExecutor(1), {"num_inference_steps": 40}
    answer = pool.submit(models(url).images.generate, prompt="3", n=4, extra_body=long)
    end = time.monotonic() + 30
    while "elit_in_flight 0.0" in httpx.get(f"{url}/metrics", timeout=60).text:
        assert time.monotonic() < end
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(DRAIN + 70)
    assert process.returncode == 0
    assert time.monotonic() - start < DRAIN + 60
    assert len(answer.result(10).data) == 4
    assert json.loads(process.stdout.read().splitlines()[-1])["unfinished"] == 0
