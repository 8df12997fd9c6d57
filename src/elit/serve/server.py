"""A service on this machine or a cluster: Ray up, Serve up, and down again when told to stop."""

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import yaml

from elit.files import Json, write_text
from elit.serve.settings import CLUSTER_VARIABLE, KEY_VARIABLE, ServiceSettings

APP = "elit"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_agent_register_timeout_ms": "120000",
}  # Ray's own patience is for idle machines; on a busy one its processes take longer than 15 s to start.
WAITS = ("raylet_start_wait_time_s", "gcs_server_port_wait_time_s", "gcs_server_request_timeout_seconds")
RAY_ENVIRONMENT |= {f"RAY_{name}": "120" for name in (*WAITS, "worker_register_timeout_seconds")}
RAY_TRIES = 3
OBJECT_STORE = 150 * 2**20  # Bytes; answers are small.


def http_options(service: ServiceSettings) -> Json:
    return {"host": service.host, "port": service.port, "request_timeout_s": 3700, "keep_alive_timeout_s": 30}


def write_config(path: Path, service: ServiceSettings) -> None:
    """Writes the file that `serve deploy` takes. Without the key: replicas read it from the environment."""
    place = {"route_prefix": "/", "import_path": "elit.serve.deployment:application"}
    app = {"name": APP, **place, "args": service.options()}
    config = {"proxy_location": "EveryNode", "http_options": http_options(service), "applications": [app]}
    write_text(path, "# serve deploy FILE, or serve run FILE\n" + yaml.safe_dump(config, sort_keys=False))


class StopSignal:
    """Waits for SIGTERM or SIGINT. `listen` takes them back from code that handles them itself, as Ray does."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self.listen()

    def listen(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self._came.set())

    def wait(self) -> None:
        while not self._came.wait(1.0):
            pass


def start(service: ServiceSettings, stop_signal: StopSignal, key: str | None = None) -> str:
    """Starts Ray and the service; returns its URL when it takes requests. Raises ValueError."""
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not service.address:
        if "ray" in sys.modules:  # it has read its environment, and its processes would listen on all addresses
            raise ValueError("ray: is imported already; start the service in a process of its own")
        os.environ[CLUSTER_VARIABLE] = "0"
    os.environ.pop(KEY_VARIABLE, None)
    environment = {KEY_VARIABLE: key} if key else {}
    os.environ.update(environment)  # what Ray starts here inherits it

    from ray import serve
    from ray.exceptions import RayError

    from elit.serve.deployment import application

    start_ray(service, environment)
    stop_signal.listen()
    where = "EveryNode" if service.address else "HeadOnly"
    try:
        serve.start(proxy_location=where, http_options=http_options(service), logging_config={"log_level": "WARNING"})
    except RayError as error:  # such as a proxy that did not start in time
        raise OSError(f"Ray Serve did not start: {str(error).splitlines()[0]}") from error
    stop_signal.listen()
    serve.run(application(service.options()), name=APP, route_prefix="/", blocking=False)
    return f"http://{f'[{service.host}]' if ':' in service.host else service.host}:{service.port}"


def start_ray(service: ServiceSettings, environment: dict[str, str]) -> None:
    """Joins a cluster, or starts Ray on this machine; on a busy one its processes may take more than one try."""
    import ray

    copies = max(service.replicas, service.max_replicas)
    options: Json = {"log_to_driver": False, "logging_level": "warning"}
    if service.address:
        options |= {"address": service.address, "runtime_env": {"env_vars": environment}}
    else:
        options |= {"num_cpus": max(1, math.ceil(copies * service.cpus)), "_node_ip_address": "127.0.0.1"}
        options |= {"address": "local"}  # else the cluster of RAY_ADDRESS, or one that runs here
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        options |= {"num_gpus": math.ceil(copies * service.gpus)} if service.gpus else {}
    for attempt in range(RAY_TRIES):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises a bare Exception where its processes are slow
            if attempt + 1 == RAY_TRIES or "timed out" not in str(error):
                raise OSError(f"Ray did not start: {error}") from None
            ray.shutdown()


def stop(drain_seconds: float | None) -> int:
    """Refuses new requests, answers those here within the limit, and ends; returns how many were left.

    drain_seconds: None for a service that did not start, whose own error is to be seen.
    """
    import ray
    from ray import serve

    if not ray.is_initialized():  # else Serve would start a Ray to stop it
        return 0
    try:
        if drain_seconds is None:
            return 0
        gateway: Any = serve.get_deployment_handle("Gateway", APP)
        left = gateway.drain.remote(drain_seconds).result(timeout_s=drain_seconds + 5)
        serve.delete(APP)  # the proxies live on and pass the last answers to their clients, which a shutdown would not
        return left
    finally:
        serve.shutdown()
        ray.shutdown()
