"""elit serve and elit loadtest without Ray: bad input, the config for serve deploy, a load test."""

import json
import signal
import subprocess

import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from service import saved_model, served

from elit.serve import server
from elit.serve.replica import load_replica
from elit.serve.settings import ServiceSettings

KEY = "a-key-of-tests"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("commands") / "digits")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("serve", "required"),
        ("serve MODEL --host 0.0.0.0", "give --api-key"),
        ("serve MODEL --api-key short", "at least 8"),
        ("serve MODEL --least-steps 50", "least_steps must be 1 to 40, got 50"),
        ("serve MODEL --port 70000 --build x.yaml", "port must be 0 to 65535, got 70000"),
        ("serve MODEL --min-replicas 2 --build x.yaml", "min_replicas must be 0 to max_replicas=0, got 2"),
        ("loadtest 127.0.0.1:1", "url must be http://HOST:PORT"),
        ("loadtest http://127.0.0.1:9 --seconds 1", "no service there"),
    ],
)
@pytest.mark.usefixtures("empty_folder")
def test_bad_input_is_one_line(run, line, why, folder, monkeypatch):
    monkeypatch.delenv("ELIT_API_KEY", raising=False)
    code, _, said = run(*line.replace("MODEL", str(folder)).split())
    assert (code, why in said, said.strip().count("\n")) == (2, True, 0)


def test_build_writes_what_serve_deploy_takes(run, folder, tmp_path):
    path = tmp_path / "app.yaml"
    line = f"serve {folder} --replicas 8 --gpus 1 --steps 12 --api-key {KEY} --host 0.0.0.0 --build {path}"
    assert run(*line.split())[0] == 0
    text = path.read_text()
    assert KEY not in text
    app = ServeDeploySchema(**yaml.safe_load(text)).applications[0]
    assert app.import_path == "elit.serve.deployment:application"
    options = dict(app.args)
    assert (options["replicas"], options["gpus"], options["needs_key"]) == (8, 1.0, True)
    assert ServiceSettings(**options).steps == 12
    by_name = ["serve", "fashion", "--build", path]  # by name: its folder is another one elsewhere
    code, _, error = run(*by_name)
    assert (code, "it exists; give another name, or --overwrite" in error, path.read_text()) == (2, True, text)
    assert run(*by_name, "--overwrite")[0] == 0
    assert yaml.safe_load(path.read_text())["applications"][0]["args"]["model"] == "fashion"


@pytest.mark.slow
def test_a_load_test_says_what_became_of_every_request(run, folder):
    service = ServiceSettings(model=str(folder), name="digits", steps=2, threads=1)
    with served(service, KEY, load_replica(service)) as (url, replica, _):  # without a profile: measured
        line = ["loadtest", url, "--rate", "4", "--burst", "5", "--seconds", "2", "--json"]
        code, said, _ = run(*line, "--api-key", KEY, "--deadline-ms", "60000")
        result = json.loads(said.splitlines()[-1])
        assert (code, result["statuses"]) == (0, {"200": result["summary"]["requests"]})
        assert result["summary"]["violations"] == 0
        code, _, error = run(*line, "--api-key", "another-key")
        assert (code, "401" in error, len(replica.here)) == (2, True, 0)


def test_a_signal_while_ray_starts_is_not_lost():
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.listen()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Ray does
        server.listen()
        signal.raise_signal(signal.SIGTERM)
        assert server.told.is_set()
    finally:
        server.told.clear()
        list(map(signal.signal, before, before.values()))


def test_a_start_that_takes_long_says_so_and_then_ends_with_all_that_it_started(monkeypatch, capsys):
    left = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(server, "SAY", 0.1)
    exits = []
    monkeypatch.setattr(server.os, "_exit", exits.append)
    with server.within(0.4, "Ray did not start"):
        left.wait(20)
    said = capsys.readouterr().err.splitlines()
    assert [line[: line.index(";")] for line in said] == [
        "elit serve: Ray did not start in 0 s",
        "elit serve: Ray did not start in 0 s",
    ]
    assert (exits, left.returncode) == ([1], -signal.SIGKILL)
    for error, why in ((TimeoutError(), r"TimeoutError\(\)"), (Exception("slow\n  trace"), "slow")):
        with pytest.raises(OSError, match=f"^Ray did not start: {why}$"), server.within(60, "Ray did not start"):
            raise error


def test_a_service_ends_with_the_processes_that_it_needs(monkeypatch, capsys):
    raylet = subprocess.Popen(["sleep", "60"])
    exits = []
    monkeypatch.setattr(server.os, "_exit", lambda code: exits.append(code) or server.stopping.set())
    raylet.send_signal(signal.SIGKILL)  # nobody has waited for it: it is a zombie
    server.watch([psutil.Process(raylet.pid)])
    assert exits == [1]
    assert f"has ended ({raylet.pid})" in capsys.readouterr().err
    server.stopping.clear()
