"""A service on this machine or a cluster: Ray up, Serve up, and down again when told to stop."""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from elit.files import Json, write_text
from elit.serve.settings import CLUSTER_VARIABLE, KEY_VARIABLE, ServiceSettings

APP = "elit"
told, stopping = threading.Event(), threading.Event()  # To stop; and Ray's processes end because of it.
RAY_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
# Ray's ten times a second is work without any request; its own metrics have no reader here.
RAY_ENVIRONMENT |= {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1", "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000"}
RAY_ENVIRONMENT |= dict.fromkeys(("RAY_enable_metrics_collection", "RAY_task_events_report_interval_ms"), "0")
RAY_ENVIRONMENT |= {"RAY_event_stats": "0", "RAY_metrics_report_interval_ms": "60000"}
WAITS = ("raylet_start_wait_time_s", "gcs_server_port_wait_time_s", "gcs_server_request_timeout_seconds")
PATIENCE = [f"RAY_{name}" for name in (*WAITS, "worker_register_timeout_seconds")]  # Ray's own, in seconds.
SAY = 15.0  # Seconds until a start or a stop says that it goes on.
VITAL = ("raylet", "gcs_server")  # Processes of Ray without which a service on this machine has ended.


def http_options(service: ServiceSettings) -> Json:
    return {"host": service.host, "port": service.port, "request_timeout_s": 3700, "keep_alive_timeout_s": 30}


def write_config(path: Path, service: ServiceSettings) -> None:
    """Writes the file that `serve deploy` takes. Without the key: replicas read it from the environment."""
    place = {"route_prefix": "/", "import_path": "elit.serve.deployment:application"}
    app = {"name": APP, **place, "args": service.options()}
    config = {"proxy_location": "EveryNode", "http_options": http_options(service), "applications": [app]}
    write_text(path, "# serve deploy FILE, or serve run FILE\n" + yaml.safe_dump(config, sort_keys=False))


def listen() -> None:
    """Takes SIGTERM and SIGINT, also back from code that handles them itself, as Ray does."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: told.set())


def start(service: ServiceSettings, key: str | None = None) -> str:
    """Starts Ray and the service; returns its URL when it takes requests. Raises ValueError."""
    for name, value in {**RAY_ENVIRONMENT, **dict.fromkeys(PATIENCE, f"{service.start_seconds:.0f}")}.items():
        os.environ.setdefault(name, value)
    if not service.address:
        if "ray" in sys.modules:  # it has read its environment, and its processes would listen on all addresses
            raise ValueError("ray: is imported already; start the service in a process of its own")
        os.environ[CLUSTER_VARIABLE] = "0"
    os.environ.pop(KEY_VARIABLE, None)
    environment = {KEY_VARIABLE: key} if key else {}
    os.environ.update(environment)  # what Ray starts here inherits it

    from ray import serve

    from elit.serve.deployment import application

    start_ray(service, environment)
    listen()
    where = "EveryNode" if service.address else "HeadOnly"
    with within(service.start_seconds, "Ray Serve did not start"):
        serve.start(proxy_location=where, http_options=http_options(service), logging_config={"log_level": "WARNING"})
    listen()
    serve.run(application(service.options()), name=APP, route_prefix="/", blocking=False)
    return f"http://{f'[{service.host}]' if ':' in service.host else service.host}:{service.port}"


def start_ray(service: ServiceSettings, environment: dict[str, str]) -> None:
    """Joins a cluster, or starts Ray on this machine."""
    import ray

    copies = max(service.replicas, service.max_replicas)
    options: Json = {"log_to_driver": False, "logging_level": "warning"}
    if service.address:
        options |= {"address": service.address, "runtime_env": {"env_vars": environment}}
    else:
        options |= {"num_cpus": max(1, math.ceil(copies * service.cpus)), "_node_ip_address": "127.0.0.1"}
        options |= {"address": "local"}  # else the cluster of RAY_ADDRESS, or one that runs here
        options |= {"include_dashboard": False, "object_store_memory": 150 * 2**20}  # bytes; answers are small
        options |= {"num_gpus": math.ceil(copies * service.gpus)} if service.gpus else {}
    with within(service.start_seconds, "Ray did not start"):
        ray.init(**options)
    vital = [each for each in psutil.Process().children() if each.name() in VITAL]
    threading.Thread(target=watch, args=[vital], daemon=True).start()


@contextmanager
def within(seconds: float, failure: str) -> Iterator[None]:
    """Says after `SAY` seconds that the block goes on, ends all after `seconds`; raises OSError where it fails."""
    load = f"the load was {psutil.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
    acts = {SAY: say, seconds: abandon}
    timers = [threading.Timer(after, act, [f"{failure} in {after:.0f} s; {load}"]) for after, act in acts.items()]
    for each in timers:
        each.start()
    try:
        yield
    except Exception as error:  # Ray raises a bare Exception where its processes are slow
        raise OSError(f"{failure}: {(str(error) or repr(error)).splitlines()[0]}") from error
    finally:
        for each in timers:
            each.cancel()


def say(line: str) -> None:
    print(f"elit serve: {line}", file=sys.stderr, flush=True)


def watch(vital: list[psutil.Process]) -> None:
    """Ends all where one of these has ended, since nothing that waits for Ray ends by itself then."""
    while not stopping.wait(1.0):
        for each in vital:
            if not each.is_running() or each.status() == psutil.STATUS_ZOMBIE:
                abandon(f"a process of Ray without which there is no service has ended ({each.pid})")


def abandon(why: str) -> None:
    """Ends all that was started here, and this process, whose own clean-up would wait for Ray."""
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    say(why)
    os._exit(1)


def stop(service: ServiceSettings, *, started: bool) -> int:
    """Refuses new requests, answers those here within the limit, and ends; returns how many were left."""
    import ray
    from ray import serve

    if not ray.is_initialized():  # else Serve would start a Ray to stop it
        return 0
    try:
        if not started:  # its own error is to be seen
            return 0
        gateway: Any = serve.get_deployment_handle("Gateway", APP)
        return gateway.drain.remote(service.drain_seconds).result(timeout_s=service.drain_seconds + 5)
    except Exception as error:  # it may have died, or answers too late
        raise OSError(f"the gateway did not answer: {(str(error) or repr(error)).splitlines()[0]}") from error
    finally:
        with within(service.start_seconds / 2, "Ray did not stop"):
            if started:
                serve.delete(APP)  # the proxies live on and pass the last answers to clients, as a shutdown would not
            serve.shutdown()
            stopping.set()
            ray.shutdown()
