"""Direct preference optimization with TRL's DPOTrainer and LoSiA.

    torchrun --nproc_per_node 8 examples/dpo.py --model MODEL --data pairs.jsonl --output_dir OUT

Each line of the data is an object with "prompt", "chosen" and "rejected". The reference is the model itself before training:
TRL loads it a second time, or computes its log-probabilities beforehand with --precompute_ref_log_probs True. Any option of
trl.DPOConfig works too: --beta 0.1 --max_steps 100 --deepspeed configs/deepspeed/zero2.json ...
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from losia_dist import LoSiAConfig, LoSiATrainerMixin
from losia_dist.errors import LoSiAError


class LoSiADPOTrainer(LoSiATrainerMixin, DPOTrainer):
    """DPOTrainer that trains subnets."""


def main() -> None:
    parser = HfArgumentParser(DPOConfig, description=__doc__)
    parser.add_argument("--model", required=True, help="directory or Hub name of a Transformers model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file")
    parser.add_argument("--losia_config", type=Path, help="YAML or JSON file of LoSiAConfig; default: the paper's p = 1/8")
    args, options = parser.parse_args_into_dataclasses()
    try:
        config = LoSiAConfig.from_file(options.losia_config) if options.losia_config else LoSiAConfig()
        trainer = LoSiADPOTrainer(
            model=options.model,
            args=args,
            train_dataset=load_dataset("json", data_files=str(options.data), split="train"),
            losia_config=config,
        )
        trainer.train()
        trainer.save_model()  # a plain model: AutoModelForCausalLM.from_pretrained(output_dir)
    except LoSiAError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
