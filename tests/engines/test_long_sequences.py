"""What is refused of the parts for long sequences: tiles that cannot be, or not under this engine; context parallelism."""

import re

import pytest
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from losia_dist import LoSiA, LoSiAAdamW, LoSiAConfig, get_losia_model, losia_parameter_groups
from losia_dist.errors import ConfigError, UnsupportedError
from losia_dist.integrations.deepspeed.tiled_mlp import use_tiled_mlp
from tests.support.models import tiny_llama

CONFIG = LoSiAConfig(rank_factor=0.25, period=2)


def drive(kind: str) -> None:
    model = get_losia_model(tiny_llama(), CONFIG)
    if kind == "tiles":
        model = DistributedDataParallel(use_tiled_mlp(model, 2))
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=(kind,)))
    optimizer = LoSiAAdamW(losia_parameter_groups(model, lr=1e-3), lr=1e-3)
    LoSiA(model, optimizer, CONFIG).detach()


WRONG = {"tiles": "mlp.* is computed in tiles", "dp_shard_cp": "sharded over 'dp_shard_cp', ranks of context parallelism"}


@pytest.mark.parametrize("kind", WRONG)
def test_an_engine_that_they_do_not_go_with_is_refused_on_every_rank(ranks, kind):
    for error, message in ranks.errors(2, drive, kind):
        assert error == "UnsupportedError"
        assert re.search(WRONG[kind], message), message


@pytest.mark.parametrize("tiles", [0, 2.0, True])
def test_tiles_are_counted(tiles):
    with pytest.raises(ConfigError, match="give the number of parts"):
        use_tiled_mlp(get_losia_model(tiny_llama(), CONFIG), tiles)


def test_a_model_that_cannot_be_tiled_is_refused():
    with pytest.raises(ConfigError, match="call use_tiled_mlp after get_losia_model"):
        use_tiled_mlp(tiny_llama(), 2)
    model = get_losia_model(tiny_llama(), CONFIG)
    model.model.layers[0].mlp.act_fn.noise = nn.Dropout(0.1)
    with pytest.raises(UnsupportedError, match="model.layers.0.mlp has dropout"):
        use_tiled_mlp(model, 2)
    with pytest.raises(ConfigError, match="has no MLP that can be tiled"):
        use_tiled_mlp(get_losia_model(tiny_llama(), CONFIG).model.layers[0].self_attn, 2)
