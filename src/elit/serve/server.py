"""A service on this machine or a cluster: Ray up, Serve up, and down again when told to stop."""

import ipaddress
import math
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elit.files import write_text
from elit.serve.settings import CLUSTER_VARIABLE, KEY_VARIABLE, ServiceSettings

APP = "elit"
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray's own patience is for idle machines; on a busy one its processes take longer than 15 s to start.
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_gcs_server_request_timeout_seconds": "120",
    "RAY_worker_register_timeout_seconds": "120",
}
RAY_TRIES = 3
OBJECT_STORE = 150 * 2**20
"""Bytes; answers are small."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a service runs, and on what."""

    host: str = "127.0.0.1"
    port: int = 8000
    address: str | None = None
    """Of a Ray cluster; None = this machine alone."""
    replicas: int = 1
    min_replicas: int = 0
    max_replicas: int = 0
    """Autoscaling between them where max_replicas is not 0."""
    cpus: float = 1.0
    gpus: float = 0.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port={self.port}: give 0 to 65535; 0 = any free one")
        if self.replicas < 1:
            raise ValueError(f"replicas={self.replicas}: give at least 1")
        if self.max_replicas < 0:
            raise ValueError(f"max_replicas={self.max_replicas}: give at least 1, or 0 for no autoscaling")
        if not 0 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas}: give 0 to max_replicas={self.max_replicas}")
        for name in ("cpus", "gpus", "drain_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give a number, 0 or more")

    def options(self, service: ServiceSettings) -> dict[str, Any]:
        """Arguments of `deployment.application`: what is not a default."""
        own = {name: getattr(self, name) for name in OPTIONS}
        values = service.to_dict() | own
        default = {name: getattr(ServiceSettings, name, None) for name in service.to_dict()}
        default |= {name: getattr(Placement, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value != default[name]}

    def http(self) -> dict[str, Any]:
        """Serve's HTTP options."""
        return {"host": self.host, "port": self.port, "request_timeout_s": 3700, "keep_alive_timeout_s": 30}


OPTIONS = ("replicas", "min_replicas", "max_replicas", "cpus", "gpus", "drain_seconds")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_key(host: str, key: str | None) -> None:
    """Raises ValueError where others could use the service without a key."""
    if not is_loopback(host) and not key:
        raise ValueError(f"host={host!r}: others can reach it; give --api-key, or {KEY_VARIABLE} in the environment")
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise ValueError("api_key: give at least 8 printable characters without a space")


def write_config(path: Path, service: ServiceSettings, placement: Placement) -> None:
    """The file that `serve deploy` takes. A key is not in it: its replicas read it from the environment."""
    config = {
        "proxy_location": "EveryNode",
        "http_options": placement.http(),
        "applications": [
            {
                "name": APP,
                "route_prefix": "/",
                "import_path": "elit.serve.deployment:application",
                "args": placement.options(service),
            }
        ],
    }
    text = "# made by elit serve --build; serve deploy FILE, or serve run FILE\n"
    write_text(path, text + yaml.safe_dump(config, sort_keys=False))


class StopSignal:
    """Whether SIGTERM or SIGINT has come. Whoever takes these signals away, as Ray does, is followed by `listen`."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self.listen()

    def listen(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: self._came.set())

    def wait(self) -> None:
        while not self._came.wait(1.0):
            pass


def start(service: ServiceSettings, placement: Placement, stop_signal: StopSignal, key: str | None = None) -> str:
    """Ray and the service; returns its URL when images can be asked for. Raises ValueError."""
    check_key(placement.host, key)
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not placement.address:
        if "ray" in sys.modules:  # it has read its environment, and its processes would listen on all addresses
            raise ValueError("ray: is imported already; start the service in a process of its own")
        os.environ[CLUSTER_VARIABLE] = "0"
    environment = {KEY_VARIABLE: key} if key else {}
    os.environ.update(environment)  # what Ray starts here inherits it
    if not key:
        os.environ.pop(KEY_VARIABLE, None)

    from ray import serve

    from elit.serve.deployment import application

    start_ray(placement, environment)
    stop_signal.listen()
    where = "EveryNode" if placement.address else "HeadOnly"
    serve.start(proxy_location=where, http_options=placement.http(), logging_config={"log_level": "WARNING"})
    stop_signal.listen()
    serve.run(application(placement.options(service)), name=APP, route_prefix="/", blocking=False)
    host = f"[{placement.host}]" if ":" in placement.host else placement.host
    return f"http://{host}:{placement.port}"


def start_ray(placement: Placement, environment: dict[str, str]) -> None:
    """Joins a cluster, or starts Ray on this machine; on a busy one its processes may take more than one try."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "warning"}
    if placement.address:
        ray.init(address=placement.address, runtime_env={"env_vars": environment}, **quiet)
        return
    copies = max(placement.replicas, placement.max_replicas)
    if placement.gpus:
        quiet["num_gpus"] = math.ceil(copies * placement.gpus)
    for attempt in range(RAY_TRIES):
        try:
            ray.init(
                num_cpus=max(1, math.ceil(copies * placement.cpus)),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
            return
        except Exception as error:  # Ray raises a bare Exception where its processes are slow
            if attempt + 1 == RAY_TRIES or "timed out" not in str(error):
                raise OSError(f"Ray did not start: {error}") from None
            ray.shutdown()


def stop(drain_seconds: float) -> int:
    """Takes no more, finishes what is here within the limit, and ends; returns how many were left."""
    import ray
    from ray import serve

    if not ray.is_initialized():  # else Serve would start a Ray to stop it
        return 0
    left = 0
    try:
        gateway: Any = serve.get_deployment_handle("Gateway", APP)
        left = gateway.drain.remote(drain_seconds).result(timeout_s=drain_seconds + 5)
    finally:
        serve.shutdown()
        ray.shutdown()
    return left
