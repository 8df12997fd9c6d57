"""A bad minute for `elit serve`: twice the load, a fifth of the clients leave, a replica dies, another stands still.

    python benchmarks/chaos.py                      # 60 s, two replicas of the boxed model
    python benchmarks/chaos.py --seconds 20

The load is open: requests go out at Poisson times. A replica is killed after a third of the time, and one stands still
for two seconds (SIGSTOP) after two thirds, as in a slow step. Exit code 0 where every request whose client stayed has
an answer of status 200, 429 or 503, and a lone request afterwards is at full quality within 10 s.
"""

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

import aiohttp
import psutil

from elit.cli.main import free_port
from elit.serve.loadtest import arrivals

LEAVING, STALL, RECOVERY = 0.2, 2.0, 10.0


async def ask(session: aiohttp.ClientSession, url: str, patience: float = 60.0) -> tuple[int, Any]:
    """Status and body; 499 where this client left, 0 where the connection broke."""
    try:
        async with asyncio.timeout(patience), session.post(f"{url}/v1/images/generations", json={"prompt": "3"}) as got:
            return got.status, await got.json()
    except TimeoutError:
        return 499 if patience < 60 else 0, None
    except aiohttp.ClientError:
        return 0, None


async def alive(session: aiohttp.ClientSession, url: str) -> int:
    """The process of a replica."""
    async with session.get(f"{url}/v1/models") as answer:
        return (await answer.json())["data"][0]["elit"]["process"]


async def run(service: int, url: str, seconds: int, replicas: int) -> bool:
    draw = random.Random(0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        alone = []
        for _ in range(5):
            start = time.monotonic()
            full = (await ask(session, url))[1]["elit"]
            alone.append(time.monotonic() - start)
        rate = 2 * replicas / median(alone)

        async def send(at: float) -> int:
            await asyncio.sleep(at)
            leaves = draw.random() < LEAVING
            return (await ask(session, url, draw.uniform(0, 2 * median(alone)) if leaves else 60.0))[0]

        async def disturb() -> None:
            victim = await alive(session, url)
            await asyncio.sleep(seconds / 3)
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(seconds / 3)
            other = next(pid for pid in replica_processes(service) if pid != victim)
            os.kill(other, signal.SIGSTOP)
            await asyncio.sleep(STALL)
            os.kill(other, signal.SIGCONT)

        trouble = asyncio.create_task(disturb())
        statuses = Counter(await asyncio.gather(*(send(at) for at in arrivals([rate] * seconds))))
        await trouble
        start, last = time.monotonic(), None
        while time.monotonic() - start < RECOVERY:
            status, body = await ask(session, url)
            last = body["elit"] if status == 200 else None
            if last and all(last[name] == full[name] for name in ("budget", "steps")):
                break
        recovery = time.monotonic() - start
    print(f"{rate:.1f} requests/s; statuses {dict(sorted(statuses.items()))}; at full quality after {recovery:.1f} s")
    return recovery < RECOVERY and set(statuses) <= {200, 429, 499, 503}


def replica_processes(service: int) -> list[int]:
    """The processes with a model below that of the command."""
    below = psutil.Process(service).children(recursive=True)
    return [each.pid for each in below if any("ServeReplica:elit:Engines" in word for word in each.cmdline())]


def main(line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fashion")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args(line)
    port = free_port("127.0.0.1", 0)
    options = f"--replicas {args.replicas} --port {port} --threads 1 --deadline-ms 5000 --start-seconds 200 --json"
    command = [sys.executable, "-m", "elit", "serve", args.model, *options.split()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        if not any("at http" in said for said in process.stderr):
            return 1
        good = asyncio.run(run(process.pid, f"http://127.0.0.1:{port}", args.seconds, args.replicas))
    finally:
        process.terminate()
        process.communicate()
    return 0 if good and process.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
