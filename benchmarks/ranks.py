"""The ranks of one machine, each a process of its own as `srun` starts them: no agent of PyTorch's stays beside them.

    python -m benchmarks.ranks COUNT SCRIPT [ARGUMENTS]

A launcher that imports torch holds 0.12 GB for as long as the run lasts, which a machine that is nearly full does not have.
When a rank fails, the others are killed; the exit status is that of the first to fail.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    count, command, port = int(sys.argv[1]), sys.argv[2:], free_port()
    ranks = []
    for rank in range(count):
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in named.items()}}
        ranks.append(subprocess.Popen([sys.executable, *command], env=environment))
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            for rank in ranks:
                rank.kill()
            return failed if failed > 0 else 128 - failed
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
