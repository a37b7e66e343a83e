"""What one process sees of its machine; collected here, judged elsewhere. Nothing is communicated."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from losia_dist import errors
from losia_dist.ranks.build_locks import stale_locks
from losia_dist.releases import installed, requirements

PACKAGE = Path(errors.__file__).parent
# What decides how a run behaves and is to be equal on all ranks, beside the interfaces' names, which may differ.
_COMPARED = ("NCCL_", "TORCH_NCCL_", "LOSIA_", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_KEPT = (*_COMPARED, "GLOO_", "ACCELERATE_", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE")
_MAY_DIFFER = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE")


@dataclass(frozen=True)
class Gpu:
    """A visible GPU. Memory in bytes, as free for this process and in all."""

    name: str
    uuid: str
    free: int
    total: int
    has_bf16: bool


def compared(environment: dict[str, str]) -> dict[str, str]:
    """The settings that must be the same on all ranks."""
    return {k: v for k, v in environment.items() if k.startswith(_COMPARED) and k not in _MAY_DIFFER}


def code_hash(directory: Path = PACKAGE) -> str:
    """16 hexadecimal digits of this package's source: paths and bytes of its Python files."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        digest.update(str(path.relative_to(directory)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:2]))}
    for name in sorted({"torch", "ninja", *(name for name, _, _ in requirements())}):
        version = installed(name)
        if version is not None:
            found[name] = version
    return found


def _backends() -> list[str]:
    looks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available} if dist.is_available() else {}
    return [name for name, is_there in looks.items() if is_there()]


def _locked_memory() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _shared_memory() -> int | None:
    return shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None


def _gpus() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append(Gpu(properties.name, str(getattr(properties, "uuid", index)), free, total, has_bf16))
    return found


@dataclass(frozen=True)
class Facts:
    """Plain values, so that ranks can exchange them.

    requirements: as "name;bounds;extra", of the installed package's metadata. shared_memory: bytes of /dev/shm, or None.
    locked_memory: bytes that a process may lock, None: no limit. stale_locks: files left by a build that was killed.
    """

    has_cuda_home: bool
    stale_locks: list[str]
    environment: dict[str, str]
    host: str = field(default_factory=socket.gethostname)
    python: str = field(default_factory=platform.python_version)
    requirements: list[tuple[str, str, str]] = field(default_factory=requirements)
    versions: dict[str, str] = field(default_factory=_versions)
    code: str = field(default_factory=code_hash)
    has_distributed: bool = field(default_factory=dist.is_available)
    backends: list[str] = field(default_factory=_backends)
    cuda_build: str = str(getattr(torch.version, "cuda", None) or getattr(torch.version, "hip", None) or "")
    gpus: list[Gpu] = field(default_factory=_gpus)
    has_gpu_device_file: bool = field(default_factory=lambda: any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd"))))
    programs: list[str] = field(default_factory=lambda: [name for name in ("c++", "ninja", "nvcc") if shutil.which(name)])
    interfaces: list[str] = field(default_factory=lambda: [name for _, name in socket.if_nameindex()])
    has_infiniband: bool = field(default_factory=lambda: any(Path("/sys/class/infiniband").glob("*")))
    locked_memory: int | None = field(default_factory=_locked_memory)
    shared_memory: int | None = field(default_factory=_shared_memory)


def collect(environment: Mapping[str, str] = os.environ) -> Facts:
    """Look at this machine through this process's eyes."""
    cache = Path(environment.get("XDG_CACHE_HOME", "~/.cache"), "torch_extensions")
    return Facts(
        has_cuda_home=bool(environment.get("CUDA_HOME")) or Path("/usr/local/cuda").is_dir(),
        stale_locks=stale_locks(Path(environment.get("TORCH_EXTENSIONS_DIR") or cache).expanduser()),
        environment={name: value for name, value in environment.items() if name.startswith(_KEPT)},
    )
