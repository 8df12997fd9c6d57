"""The launch files: accelerate reads them, and the SLURM script stops and requeues."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from commands import quick_to_import
from test_loop import losses, tiny

from elit.config import save_config

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


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for i in 0 1; do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
  echo $! >> "$TASKS"
done
wait -n && wait
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo localhost ;; requeue) echo "$2" > "$REQUEUED" ;; esac
"""


@pytest.mark.slow
def test_slurm_stops_in_time_and_requeues(tmp_path):
    """With stand-ins for srun and scontrol: two tasks get SIGTERM, save, end with 0, and the job is queued again."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    scripts = {"srun": SRUN, "scontrol": SCONTROL, "elit": f'#!/bin/bash\nexec {sys.executable} -m elit "$@"\n'}
    for name, text in scripts.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(stat.S_IRWXU)
    out, tasks, requeued = tmp_path / "run", tmp_path / "tasks", tmp_path / "requeued"
    save_config(tiny(out, steps=400, log_every=1, checkpoint_every=1000), tmp_path / "config.yaml")
    job_id = str(20_000 + os.getpid() % 20_000)
    line = ["bash", str(LAUNCH / "slurm.sh"), "--config", str(tmp_path / "config.yaml")]
    with quick_to_import(tmp_path) as environment:
        environment |= {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": job_id, "OUT": str(out)}
        environment |= {"SLURM_JOB_NODELIST": "localhost", "TASKS": str(tasks), "REQUEUED": str(requeued)}
        job = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
        while job.poll() is None and not ((out / "metrics.jsonl").is_file() and losses(out)):
            time.sleep(0.01)
        for task in tasks.read_text().split():
            os.kill(int(task), signal.SIGTERM)
        said = job.communicate()[1]
    assert job.returncode == 0, said
    assert "stopped by SIGTERM after step" in said
    assert requeued.read_text().strip() == job_id
    assert len(list((out / "checkpoints").iterdir())) == 1
