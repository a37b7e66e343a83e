"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks all` runs those that a small machine can, one by one."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import table

# name: (question, arguments of `all`, or None where it is left out)
BENCHMARKS: dict[str, tuple[str, list[str] | None]] = {
    "step_time": ("how long is a step, beside the floor, LoRA, GaLore, full fine-tuning?", []),
    "memory": ("peak memory, bytes kept for backward, bytes of state?", []),
    "communication": ("bytes sent per rank and step, by engine?", ["--json", "benchmarks/results/communication.json"]),
    "relocalization": ("what does moving one layer's subnets cost, at 7B's sizes?", []),
    "growth": ("how do the costs grow with width, depth, length, rank factor, ranks?", []),
    "long_context": ("what do ranks that share sequences keep, send, and reach?", None),
    "data": ("how long is tokenizing, the first time and again, and what does a rank hold?", None),
    "whole_life": ("a 7B on 24 GB: trained, killed, resumed, exported; what does it hold, beside the plan and LoRA?", None),
    "profile_step": ("in which operators does a method spend more than the floor?", None),
    "builds": ("two builds by turns: what each takes beyond the floor?", None),
    "importance_steps": ("what does importance from a few steps of a slot choose?", None),
    "quality": ("does it learn as much as full fine-tuning, LoRA, DoRA, GaLore, and forget as little?", None),
    "figures": ("the stored results as pictures", []),
    "gpu": ("everything that only a GPU can show (benchmarks/gpu.sh)", None),
}


def main() -> None:
    if sys.argv[1:] not in ([], ["all"]):
        raise SystemExit(f"python -m benchmarks {' '.join(sys.argv[1:])}: give nothing (a list) or 'all'.")
    print(table(["python -m benchmarks.", "question"], [[name, question] for name, (question, _) in BENCHMARKS.items()]))
    if sys.argv[1:] == ["all"]:
        for name, (_, arguments) in BENCHMARKS.items():
            if arguments is not None:
                print(f"\n== {name}", flush=True)
                subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
