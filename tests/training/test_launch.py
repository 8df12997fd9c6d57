"""The launch files: accelerate reads them, and the SLURM script stops and requeues."""

import json
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from elit.serve.metrics import Metrics

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [("one-gpu", 1, 1, "NO"), ("ddp-8", 1, 8, "MULTI_GPU"), ("two-nodes", 2, 16, "MULTI_GPU")],
)
def test_accelerate_reads_them(name, machines, processes, kind):
    path = LAUNCH / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert (found.num_machines, found.num_processes, found.distributed_type) == (machines, processes, kind)
    assert "mixed_precision" not in yaml.safe_load(path.read_text())  # the run's config has it
    assert f"--config_file launch/{name}.yaml" in path.read_text()


def test_dashboard_and_alerts_read_metrics_that_there_are():
    metrics = Metrics()
    metrics.requests.labels("200").inc()
    known = {family.name: family.type for family in metrics.registry.collect()}
    rules = yaml.safe_load((LAUNCH / "alerts.yaml").read_text())["groups"][0]["rules"]
    panels = json.loads((LAUNCH / "grafana.json").read_text())["panels"]
    queries = [rule["expr"] for rule in rules] + [each["expr"] for panel in panels for each in panel["targets"]]
    used = set(re.findall(r"elit_\w+", " ".join(queries)))
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    assert used <= {name + ending for name, kind in known.items() for ending in endings[kind]}
    assert all(any(name.startswith(family) for name in used) for family in known)
    guide = (LAUNCH.parent / "docs" / "serving.md").read_text()
    assert all(f"`{family}`" in guide for family in known)


SCRIPTS = {
    "srun": """#!/bin/bash
shift  # --kill-on-bad-exit
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
  echo $! >> "$AT/tasks"
done
wait -n && wait
""",
    "scontrol": """#!/bin/bash
case $1 in show) echo localhost ;; requeue) echo "$2" > "$AT/requeued" ;; esac
""",
    "elit": """#!/bin/bash
trap 'exit 0' TERM
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" > "$AT/elit-$RANK"
while true; do sleep 0.01; done
""",
}


def test_slurm_stops_in_time_and_requeues(tmp_path):
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "AT": str(tmp_path), "OUT": "runs/xl"}
    environment |= {"SLURM_JOB_ID": "20001", "SLURM_JOB_NODELIST": "localhost"}
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sh", "--config", "x.yaml"], env=environment)
    while job.poll() is None and not all((tmp_path / f"elit-{rank}").is_file() for rank in (0, 1)):
        time.sleep(0.01)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    assert job.wait(30) == 0
    given = "2 localhost:20001 train --resume --out runs/xl --config x.yaml\n"
    assert [(tmp_path / f"elit-{rank}").read_text() for rank in (0, 1)] == [f"0 0 {given}", f"1 1 {given}"]
    assert (tmp_path / "requeued").read_text() == "20001\n"
