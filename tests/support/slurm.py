"""SLURM's commands as far as launch/slurm/train.sbatch uses them: tasks are processes of this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.support.launching import BIN, ROOT

SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"

# Every task runs the command; SIGTERM kills them, as the real srun does; the worst exit code is its own.
_SRUN = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=$SLURM_NTASKS "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$FAKE_SLURM/tasks"
trap 'kill -KILL "${tasks[@]}"' TERM
worst=0
for task in "${tasks[@]}"; do
  code=0
  wait "$task" || code=$?
  if ((code > worst)); then worst=$code; fi
done
exit "$worst"
"""
_SCANCEL = r"""#!/usr/bin/env bash
[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
read -ra tasks <"$FAKE_SLURM/tasks"
kill -TERM "${tasks[@]}"
"""
_SCONTROL = r"""#!/usr/bin/env bash
case "$1" in
  show) echo localhost ;;
  requeue) echo "$2" >>"$FAKE_SLURM/requeued" ;;
  *) exit 1 ;;
esac
"""


class Slurm:
    """A job of one node and two tasks. directory: its log, and what the commands leave behind."""

    def __init__(self, directory: Path, job: int) -> None:
        self.directory, self.job = directory, job
        self.bin = directory / "bin"
        self.bin.mkdir(parents=True)
        for name, text in {"srun": _SRUN, "scancel": _SCANCEL, "scontrol": _SCONTROL}.items():
            self.replace(name, text)

    def replace(self, name: str, text: str) -> None:
        """Put a program of the test's own before those of that name."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def start(self, *words: str, restarts: int = 0, **environment: str) -> subprocess.Popen[str]:
        """Run the batch script, as SLURM does it: a copy, and in the folder where the job was submitted."""
        copy = self.directory / "slurm_script"
        copy.write_text(SCRIPT.read_text())
        slurm = {
            "SLURM_JOB_ID": str(self.job),
            "SLURM_JOB_NODELIST": "node[0]",
            "SLURM_NTASKS": "2",
            "SLURM_SUBMIT_DIR": str(ROOT),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        variables = {
            **{name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "FAKE_SLURM": str(self.directory),
            "PATH": f"{self.bin}:{BIN}:{os.environ['PATH']}",
            **slurm,
            **environment,
        }
        with open(self.directory / "log", "a") as log:
            return subprocess.Popen(["bash", str(copy), *words], env=variables, cwd=ROOT, stdout=log, stderr=log, text=True)

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    @property
    def requeued(self) -> int:
        """How often the script had the job queued again."""
        file = self.directory / "requeued"
        return len(file.read_text().splitlines()) if file.exists() else 0
