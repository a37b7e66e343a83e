"""Two hosts on one machine: network namespaces joined by a virtual cable, each with its own address, name and hosts file.

The cable's ends are both called eth0. `start` runs a command on a host; `cut` and `mend` pull and plug the cable; `power_off`
ends a host as a power failure does: the cable is dead first, so that nobody is told. Linux, root, iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("node-a", "node-b")
SSH_PORT = 2222


def missing(*programs: str) -> str:
    """Why no hosts can be made here; empty where they can. programs: what a test needs besides, by name."""
    absent = [name for name in ("ip", "unshare", *programs) if find(name) is None]
    if absent:
        return f"two hosts on one machine need {', '.join(absent)} (Debian: iproute2, openssh-server, pdsh)"
    probe = f"losia-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"two hosts on one machine need the right to make network namespaces: {made.stderr.strip()}"
    entered = subprocess.run(["ip", "netns", "exec", probe, "unshare", "--uts", "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return entered.stderr.strip()


def find(program: str) -> str | None:
    """sshd is where an ordinary user's PATH does not lead."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class TwoHosts:
    """Made and closed by one test; `close` ends whatever still runs on them.

    directory: for logs and keys.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spaces = [f"losia-{os.getpid()}-{letter}" for letter in "ab"]
        self.processes: list[subprocess.Popen[bytes]] = []
        for space in self.spaces:
            _run("ip", "netns", "add", space)
            etc = Path("/etc/netns") / space  # what `ip netns exec` lays over /etc
            etc.mkdir(parents=True)
            entries = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, NAMES, strict=True))]
            (etc / "hosts").write_text("\n".join(entries) + "\n")
        first, second = self.spaces
        _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", "eth0", "up")

    def __enter__(self) -> TwoHosts:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, host: int, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Run a command on host 0 or 1, its output into the named log."""
        variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        variables |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "NETWORK_INTERFACE": "eth0",
            "PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin",
            **environment,
        }
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', NAMES[host], *command]
        with open(self.directory / log, "ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.spaces[host], *named], env=variables, cwd=ROOT, stdout=file, stderr=file
            )
        self.processes.append(process)
        return process

    def text(self, log: str) -> str:
        return (self.directory / log).read_text(errors="replace")

    def find(self, host: int, variable: str) -> list[int]:
        """Processes on a host whose environment has this variable, as "NAME=value"."""
        return [process for process in _processes(self.spaces[host]) if variable in _environment(process)]

    def cut(self) -> None:
        """Pull the cable: both ends lose their carrier, no connection is told."""
        _run("ip", "-n", self.spaces[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        _run("ip", "-n", self.spaces[1], "link", "set", "eth0", "up")

    def power_off(self, host: int) -> None:
        """The host is gone at once, and says nothing any more."""
        self.cut()
        self._kill(self.spaces[host])

    def serve_ssh(self) -> Path:
        """sshd on both hosts, for one key; returns a folder with an `ssh` that uses it, to be put first on the PATH."""
        keys = self.directory / "ssh"
        if not keys.exists():
            keys.mkdir()
            for name in ("user", "host"):
                _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name))
        Path("/run/sshd").mkdir(exist_ok=True)
        server = ["-D", "-e", "-f", "/dev/null", "-h", str(keys / "host"), "-p", str(SSH_PORT)]
        options = {"AuthorizedKeysFile": keys / "user.pub", "StrictModes": "no", "UsePAM": "no", "PidFile": "none"}
        options |= {"PermitRootLogin": "prohibit-password", "PasswordAuthentication": "no"}
        for name, value in options.items():
            server += ["-o", f"{name}={value}"]
        for host in (0, 1):
            self.start(host, [str(find("sshd")), *server], f"sshd-{host}")
        wrapper = keys / "bin" / "ssh"
        wrapper.parent.mkdir(exist_ok=True)
        words = f"-F /dev/null -p {SSH_PORT} -i {keys / 'user'} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        wrapper.write_text(f'#!/bin/sh\nexec {find("ssh")} {words} -o LogLevel=ERROR -o BatchMode=yes "$@"\n')
        wrapper.chmod(0o755)
        return wrapper.parent

    def end_all(self) -> None:
        """End every process on both hosts."""
        for space in self.spaces:
            self._kill(space)
        for process in self.processes:
            process.wait(10)

    def close(self) -> None:
        """End every process, and remove the hosts."""
        self.end_all()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)

    @staticmethod
    def _kill(space: str) -> None:
        for process in _processes(space):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def wait_for(happened: Callable[[], Any], seconds: float, describe: Callable[[], str]) -> float:
    """Seconds until it happened. Raises: AssertionError, with a description, where it did not in time."""
    began = time.monotonic()
    while not happened():
        waited = time.monotonic() - began
        assert waited < seconds, f"not within {seconds:g} s:\n{describe()[-6000:]}"
        time.sleep(0.05)
    return time.monotonic() - began


def _processes(space: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(process) for process in listed.stdout.split()]


def _environment(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []  # it has ended


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
