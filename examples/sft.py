"""Supervised fine-tuning with TRL's SFTTrainer and LoSiA.

    torchrun --nproc_per_node 8 examples/sft.py --model MODEL --data train.jsonl --output_dir OUT

Each line of the data is an object with "prompt" and "completion", or "messages", or "text" (TRL's own forms). Any option of
trl.SFTConfig works too: --max_steps 100 --deepspeed configs/deepspeed/zero2.json --max_length 2048 ...
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from losia_dist import LoSiAConfig, LoSiATrainerMixin
from losia_dist.errors import LoSiAError


class LoSiASFTTrainer(LoSiATrainerMixin, SFTTrainer):
    """SFTTrainer that trains subnets."""


def main() -> None:
    parser = HfArgumentParser(SFTConfig, description=__doc__)
    parser.add_argument("--model", required=True, help="directory or Hub name of a Transformers model")
    parser.add_argument("--data", required=True, type=Path, help="JSONL file")
    parser.add_argument("--losia_config", type=Path, help="YAML or JSON file of LoSiAConfig; default: the paper's p = 1/8")
    args, options = parser.parse_args_into_dataclasses()
    try:
        config = LoSiAConfig.from_file(options.losia_config) if options.losia_config else LoSiAConfig()
        trainer = LoSiASFTTrainer(
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
