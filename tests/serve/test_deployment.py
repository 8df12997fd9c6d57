"""Ray Serve itself, in a process of its own as a user starts it: one Ray for this file, on the loopback address."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
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
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def models(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_an_image(service):
    answer = models(service[0]).images.generate(prompt="three", extra_body={"seed": 3, "budget": 2})
    assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")
    events = models(service[0]).images.generate(prompt="three", stream=True, partial_images=1, extra_body={"seed": 3})
    assert [event.type for event in events][-1] == "image_generation.completed"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_every_process_of_the_service_listens_on_this_machine_alone(service):
    """Ray's own processes too, by RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, and what replicas open for each other."""
    addresses = listening_addresses(service[1].pid)
    assert len(addresses) > 5  # the proxy, GCS, raylet, workers
    loopback = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert not [each for each in addresses if each[1] not in loopback]


def listening_addresses(parent):
    """(process name, address) of every listening TCP socket of a process and those that it started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
    own = {parent}
    while more := {pid for pid, of in parents.items() if of in own} - own:
        own |= more
    listening = {}
    for version, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{version}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                words = bytes.fromhex(fields[1].split(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                listening[fields[9]] = socket.inet_ntop(family, packed)
    addresses = set()
    for pid in own:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
            inodes = [link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")]
            addresses |= {(f"{name} {pid} {inode}", listening[inode]) for inode in inodes if inode in listening}
    return addresses


def test_a_replica_killed_in_a_burst_loses_no_request_and_comes_back(service):
    url = service[0]
    process = models(url).models.retrieve("digits").model_extra["elit"]["process"]
    times = arrivals([8.0] * 4, seed=1)
    killer = threading.Timer(1.5, os.kill, (process, signal.SIGKILL))
    killer.start()
    outcomes = run_loadtest(url, times, prompts=["3"], deadline_ms=60_000)
    killer.join()
    assert {each.status for each in outcomes} <= {200, 429, 503}
    assert sum(each.status == 200 for each in outcomes) > 0  # how many is a matter of how fast a process starts
    end = time.monotonic() + START
    while (status := asked(url)) != 200:
        assert status in (429, 503)
        assert time.monotonic() < end
        time.sleep(0.5)


def asked(url):
    """The status of one request."""
    try:
        models(url).images.generate(prompt="3")
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def requests_in_flight(url):
    text = httpx.get(f"{url}/metrics", timeout=60).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return families["elit_in_flight"].samples[0].value


def test_sigterm_drains_within_the_limit(service):
    url, process = service
    answers = []

    def ask():
        answers.append(models(url).images.generate(prompt="3", n=4, extra_body={"num_inference_steps": 40}))

    asking = threading.Thread(target=ask)
    asking.start()
    end = time.monotonic() + 30
    while not requests_in_flight(url):
        assert time.monotonic() < end
        time.sleep(0.02)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(DRAIN + 70)
    asking.join(10)
    assert process.returncode == 0
    assert time.monotonic() - start < DRAIN + 60
    assert len(answers[0].data) == 4
    assert json.loads(process.stdout.read().splitlines()[-1])["unfinished"] == 0
