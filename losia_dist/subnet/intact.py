"""Whether a converted model is still the one that was converted: every subnet in its place, in its weight, and training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from losia_dist.errors import ConfigError, some
from losia_dist.subnet.access import BlockAccess, whole_shape
from losia_dist.subnet.linear import TiedSubnetEmbedding
from losia_dist.subnet.site import Site

_FIX = (
    "Change a model (vocabulary, adapters, quantization, weights that are tied) before get_losia_model, then wrap it and make "
    "LoSiA(...)"
)


def check_intact(model: nn.Module, sites: Sequence[Site], access: BlockAccess, *, trains: bool) -> None:
    """Compare a model with what `get_losia_model` made of it. Reads no values; the same on every rank, which speak to none.

    Args:
        sites: those that the conductor drives.
        trains: whether what is frozen matters.

    Raises:
        ConfigError: layers that were replaced, resized or frozen since, or whose weight an embedding shares since.
    """
    there = {id(module) for module in model.modules()}
    found = {site.name for site in sites if id(site.module) in there}
    lost = [name for name in sites[0].converted_with if name not in found]
    if lost:
        raise ConfigError(
            f"{some(lost)}: made to train by a subnet in get_losia_model, and the model has other modules in their place now "
            "(resize_token_embeddings, set_output_embeddings, an adapter or a quantizer put them there), which would stay as "
            f"they are. {_FIX}."
        )
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    heads = {id(module.__dict__["head"].site) for module in embeddings if isinstance(module, TiedSubnetEmbedding)}
    plain = {id(module.weight) for module in embeddings if not isinstance(module, TiedSubnetEmbedding)}
    for site in sites:
        shape, before = whole_shape(access, site), site.converted_with[site.name]
        if tuple(shape) != tuple(before):
            raise ConfigError(
                f"the weight of {site.name} is {list(shape)} now, and was {list(before)} in get_losia_model "
                f"(resize_token_embeddings does that): its subnet would lie elsewhere. {_FIX}."
            )
        if (site.shares_embedding and id(site) not in heads) or id(site.weight) in plain:
            raise ConfigError(
                f"{site.name} and the input embedding share a weight now and did not in get_losia_model, or the other way "
                f"round (set_input_embeddings, tie_weights): the look-up would not learn what the subnet does. {_FIX}."
            )
        if trains and (not site.subnet.requires_grad or site.weight.requires_grad):
            frozen = "its subnet was frozen" if not site.subnet.requires_grad else "its whole weight was made to train"
            raise ConfigError(
                f"{site.name}: {frozen} since get_losia_model (adapters do that, and loops over requires_grad). {_FIX}."
            )
