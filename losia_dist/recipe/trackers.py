"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio, MLflow (`--report_to`).

Each is its own library, imported where it is asked for. Accelerate has the same calls behind one class, but its trackers log
through a state of Accelerate's that this script does not make.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from losia_dist.errors import ConfigError
from losia_dist.run.run_facts import flat_settings

PROJECT = "losia_dist"  # unless WANDB_PROJECT, TRACKIO_PROJECT or MLFLOW_EXPERIMENT_NAME names another


class Tracker(Protocol):
    """One of them, on rank 0 alone, from the beginning of a run to its end."""

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None: ...

    def finish(self) -> None: ...


class TensorBoard:
    """Events in DIRECTORY/tensorboard."""

    def __init__(self, directory: Path, about: Mapping[str, str], begun: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=None if begun is None else begun + 1)
        if begun is None:
            self._writer.add_text("run", "\n".join(f"    {name}: {value}" for name, value in about.items()), 0)

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; with WANDB_MODE=offline into DIRECTORY/wandb."""

    def __init__(self, directory: Path, about: Mapping[str, str], begun: int | None) -> None:
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self._run = wandb.init(project=project, name=directory.name, config=dict(about), dir=str(directory))

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._run.log({**numbers, **texts}, step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio(WandB):
    """trackio, in its own folder (TRACKIO_DIR)."""

    def __init__(self, directory: Path, about: Mapping[str, str], begun: int | None) -> None:
        trackio = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(project=project, name=directory.name, config=dict(about), embed=False)


class MLflow:
    """MLflow, where MLFLOW_TRACKING_URI says."""

    def __init__(self, directory: Path, about: Mapping[str, str], begun: int | None) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        self._mlflow.start_run(run_name=directory.name)
        self._mlflow.log_params(dict(about))

    def log(self, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


def check_trackers(names: Sequence[str]) -> None:
    """Raises: ConfigError for one that is not known or not installed. Nothing is imported."""
    for name in names:
        if name == "none" and len(names) > 1:
            raise ConfigError(f"--report_to {' '.join(names)}: give none alone, or leave it out.")
        if name != "none" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--report_to {name}: it is not installed: pip install {name}.")


def start_trackers(names: Sequence[str], directory: Path, about: Mapping[str, Any], begun: int | None) -> list[Tracker]:
    """Begin a run in each. Rank 0 alone calls it.

    Args:
        directory: of the run; its name is the run's.
        about: what the run is; a mapping in it (LoSiA's settings) becomes one value for each setting, losia_config/period.
        begun: the step that the run goes on from, in the same directory; None: it is new.

    Raises:
        ConfigError: one of them cannot be begun (no login, no network).
    """
    flat = flat_settings(about)
    started: list[Tracker] = []
    for name in names:
        if name == "none":
            continue
        try:
            started.append(TRACKERS[name](directory, flat, begun))
        except Exception as error:  # a tracker's own, of any kind
            raise ConfigError(f"--report_to {name}: it could not begin: {type(error).__name__}: {error}") from error
    return started
