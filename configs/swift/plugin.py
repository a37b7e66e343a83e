"""LoSiA inside ms-swift 4.6: `swift sft --tuner_type full --external_plugins configs/swift/plugin.py ...`.

LOSIA_CONFIG names a preset or a file of settings; without it they are the published ones.
"""

import os

from swift.trainers import Seq2SeqTrainer, TrainerFactory

from losia_dist import LoSiAConfig, LoSiATrainerMixin


class LoSiASwiftTrainer(LoSiATrainerMixin, Seq2SeqTrainer):
    """ms-swift's trainer that trains subnets, and saves plain models."""

    def __init__(self, *args, **kwargs):
        config = LoSiAConfig.read(os.environ.get("LOSIA_CONFIG", "published"))
        super().__init__(*args, losia_config=config, **kwargs)


# ms-swift imports a trainer by its name, and knows this file under the one that it was loaded with.
TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.LoSiASwiftTrainer"
