"""LoSiA's settings in the configuration that the Trainer's own trackers keep of a run, as losia_config/period and so on.

The Trainer sends them its arguments and the model's configuration; these settings are in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from losia_dist.config.losia_config import LoSiAConfig
from losia_dist.run.run_facts import flat_settings

Settings = Mapping[str, Any]


def tell_trackers(callbacks: Iterable[Any], config: LoSiAConfig) -> None:
    """Called on the first rank once trackers have begun their runs.

    Args:
        callbacks: of the Trainer; of those that are TensorBoard's, Weights & Biases', trackio's or MLflow's each is told.
    """
    settings = flat_settings({"losia_config": config.to_dict()})
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in _TELL:
                _TELL[kind.__name__](callback, settings)


def _tensorboard(callback: Any, settings: Settings) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text("losia_config", "\n".join(f"    {name}: {value}" for name, value in settings.items()), 0)


def _wandb(callback: Any, settings: Settings) -> None:
    if callback._wandb is not None:
        callback._wandb.config.update(dict(settings), allow_val_change=True)


def _trackio(callback: Any, settings: Settings) -> None:
    callback._trackio.config.update(dict(settings), allow_val_change=True)


def _mlflow(callback: Any, settings: Settings) -> None:
    callback._ml_flow.log_params(dict(settings))


_TELL: dict[str, Callable[[Any, Settings], None]] = {
    "TensorBoardCallback": _tensorboard,
    "WandbCallback": _wandb,
    "TrackioCallback": _trackio,
    "MLflowCallback": _mlflow,
}
