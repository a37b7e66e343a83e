"""Judgement of one machine: versions, combinations that are known not to work, GPUs, and the environment's settings."""

from __future__ import annotations

from collections.abc import Iterator

from losia_dist.errors import ConfigError
from losia_dist.ranks.watch.liveness import read_limits
from losia_dist.releases import admits
from losia_dist.tools.doctor.findings import Finding, error, ok, warning
from losia_dist.tools.doctor.machine_facts import Facts

GB = 1e9
_FREE_SHARE = 0.9  # of a GPU's memory that should be free before a run; a driver's own context takes less than the rest
_SHARED_MEMORY = 1 << 30  # bytes of /dev/shm that NCCL and data workers of a node's ranks get along with
_FROM_PYPI = "install a build of torch from PyPI"

# (variable, the value that hurts or "" for any, what it does, fix)
_SETTINGS = [
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", "a collective that failed or timed out hangs for ever", "unset it"),
    ("NCCL_ASYNC_ERROR_HANDLING", "", "is an old name", "TORCH_NCCL_ASYNC_ERROR_HANDLING, or unset it"),
    ("NCCL_BLOCKING_WAIT", "", "is an old name", "TORCH_NCCL_BLOCKING_WAIT, or unset it"),
    ("TORCH_NCCL_BLOCKING_WAIT", "1", "the host waits in every collective, so nothing overlaps", "unset it"),
    ("CUDA_LAUNCH_BLOCKING", "1", "the host waits for every kernel", "unset it"),
    ("NCCL_P2P_DISABLE", "1", "GPUs of one node exchange data through the host", "unset it, if the node has NVLink"),
    ("NCCL_IB_DISABLE", "1", "nodes exchange data over TCP", "unset it, if the nodes have InfiniBand or RoCE"),
    ("NCCL_SHM_DISABLE", "1", "GPUs of one node exchange data over the network", "unset it"),
]


def examine(facts: Facts, local_rank: int, local_world_size: int, needs_deepspeed: bool) -> list[Finding]:
    """All findings about one machine, as the rank with this number on it sees it. Pure; every rank calls it."""
    return [
        ok("python", f"{facts.python}, losia_dist {facts.code}"),
        *_versions(facts, needs_deepspeed),
        *_build(facts),
        *_deepspeed_tools(facts, needs_deepspeed),
        *_gpus(facts, local_rank, local_world_size),
        *_limits(facts, local_world_size),
        *check_settings(facts),
    ]


def _versions(facts: Facts, needs_deepspeed: bool) -> Iterator[Finding]:
    """Installed packages against the bounds of setup.cfg."""
    fine = []
    for name, bounds, extra in facts.requirements:
        version, fix = facts.versions.get(name), f"pip install '{name}{bounds}'"
        needed = not extra or (name == "deepspeed" and needs_deepspeed)
        if version is None:
            if needed:
                yield error("versions", f"{name} is not installed.", fix)
        elif not admits(bounds, version):
            where = f" (used by the extra {extra})" if extra else ""
            yield (error if needed else warning)("versions", f"{name} {version} is outside {bounds}{where}.", fix)
        elif extra != "dev":
            fine.append(f"{name} {version}")
    if not facts.requirements:
        yield warning("versions", "the package is not installed, so no bounds are known.", "pip install -e .")
    if fine:
        yield ok("versions", ", ".join(dict.fromkeys(fine)))


def _build(facts: Facts) -> Iterator[Finding]:
    """torch's build against what it is to do here, and what a killed start left of its operators."""
    if not facts.has_distributed or "gloo" not in facts.backends:
        what = "gloo" if facts.has_distributed else "torch.distributed"
        yield error("torch", f"this build is without {what}: one process only.", _FROM_PYPI)
    if facts.cuda_build and "nccl" not in facts.backends and facts.has_distributed:
        yield error("torch", "this GPU build is without NCCL: several GPUs cannot train.", _FROM_PYPI)
    if facts.has_gpu_device_file and not facts.cuda_build:
        text = "this machine has GPUs, and torch is a build for CPUs."
        yield error("torch", text, "install the build for your CUDA version")
    if not facts.gpus and facts.environment.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        text = "on a CPU Accelerate drops FSDP without a word: what it prepares trains unsharded (not losia-dist train)."
        yield warning("accelerate", text, "torchrun with --sharding fsdp2, or the plain PyTorch loop with fully_shard")
    for lock in facts.stale_locks:
        text = "was left by a start that was killed: losia_dist removes it, a program without it waits for ever."
        yield warning("operators", f"{lock} {text}", f"rm {lock}")


def _deepspeed_tools(facts: Facts, needs_deepspeed: bool) -> Iterator[Finding]:
    """DeepSpeed compiles operators when they are first used."""
    if "deepspeed" not in facts.versions:
        return
    absent = [name for name in ("c++", "ninja") if name not in facts.programs]
    if facts.gpus and "nvcc" not in facts.programs and not facts.has_cuda_home:
        absent.append("nvcc")
    if not absent:
        yield ok("deepspeed", f"{facts.versions['deepspeed']}, with what it compiles its operators by")
        return
    text = "DeepSpeed cannot compile its operators (its communication on CPUs, fused optimizers)."
    fix = "apt-get install g++, pip install ninja, and for nvcc a CUDA toolkit, on the PATH that the ranks have"
    make = error if needs_deepspeed and not facts.gpus else warning
    yield make("deepspeed", f"{', '.join(absent)} not found: {text}", fix)


def _gpus(facts: Facts, local_rank: int, local_world_size: int) -> Iterator[Finding]:
    """Visibility and free memory of the GPU of this rank; alone, of all."""
    count = len(facts.gpus)
    if not count and facts.cuda_build:
        text = f"torch is built for CUDA/ROCm {facts.cuda_build} and sees no GPU: training would run on the CPU."
        fix = "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES, and what the container is given (--gpus all)"
        yield warning("gpus", text, fix)
    elif not count:
        yield ok("gpus", "none; training runs on the CPU")
    elif local_rank >= count or local_world_size > count:
        text = f"{local_world_size} ranks on {facts.host}, which shows {count} GPU(s) to rank {local_rank} of them."
        fix = "one rank per GPU (--nproc_per_node, slots=, --ntasks-per-node), and every rank sees all GPUs of its node"
        yield error("gpus", text, fix)
    else:
        seen = facts.gpus if local_world_size == 1 else [facts.gpus[local_rank]]
        wrong = []
        for gpu in seen:
            if gpu.free < _FREE_SHARE * gpu.total:
                text = f"{gpu.name}: {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free; something else uses it."
                wrong.append(warning("gpus", text, "nvidia-smi lists the processes on it; end those of earlier runs"))
            if not gpu.has_bf16:
                wrong.append(warning("gpus", f"{gpu.name} has no bf16, the default on GPUs.", "--precision fp32"))
        least = min(gpu.free for gpu in seen)
        yield from wrong or [ok("gpus", f"{count} x {facts.gpus[0].name} on {facts.host}, {least / GB:.0f} GB free")]


def _limits(facts: Facts, local_world_size: int) -> Iterator[Finding]:
    """Limits that containers and schedulers set."""
    shared, several = facts.shared_memory, len(facts.gpus) > 1 or local_world_size > 1
    if shared is not None and shared < _SHARED_MEMORY and several:
        text = f"/dev/shm of {facts.host} has {shared / 1e6:.0f} MB, which NCCL and data workers fill."
        fix = "docker run --shm-size 16g (or --ipc=host); in Kubernetes an emptyDir of medium Memory at /dev/shm"
        yield warning("shared memory", text, fix)
    if facts.has_infiniband and facts.locked_memory is not None:
        text = f"limited to {facts.locked_memory / 1e6:.0f} MB on {facts.host}, which has InfiniBand."
        fix = "ulimit -l unlimited (docker run --ulimit memlock=-1; PropagateResourceLimits in SLURM)"
        yield warning("locked memory", text, fix)


def check_settings(facts: Facts) -> Iterator[Finding]:
    """The environment's variables."""
    on = facts.environment
    for name, bad, text, fix in _SETTINGS:
        if name in on and bad in ("", on[name]):
            yield warning("settings", f"{name}={on[name]}: {text}.", fix)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if on.get(name) and not _names_interface(on[name], facts.interfaces, by_prefix=name.startswith("NCCL")):
            text = f"{name}={on[name]} names no interface of {facts.host} ({', '.join(facts.interfaces)})."
            yield error("settings", text, "one of those; on clusters of unequal nodes, set it per node")
    if on.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and on.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        text = "ranks that torchrun starts again find the addresses of those before in its store (PyTorch issue 135712)."
        fix = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 with --rdzv_backend c10d, or --max_restarts 0"
        yield warning("settings", text, fix)
    try:
        if read_limits(on) is None:
            text = "LOSIA_LIVENESS=0: a rank that is lost leaves the others waiting for the process group's time limit."
            yield warning("settings", text, "unset it")
    except ConfigError as problem:
        yield error("settings", str(problem), "unset it for the default")


def _names_interface(value: str, interfaces: list[str], by_prefix: bool) -> bool:
    """NCCL takes prefixes, "=name" for a whole name and "^name" for all others; gloo whole names."""
    if by_prefix and value.startswith("^"):
        return True
    exact = not by_prefix or value.startswith("=")
    names = [name.strip() for name in value.removeprefix("=").split(",")]
    return any(name == there if exact else there.startswith(name) for name in names for there in interfaces)
