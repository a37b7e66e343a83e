"""Run in axolotl's environment: `LoSiATrainer` over the data that axolotl has prepared. Prints the losses; saves into own/."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from losia_dist import LoSiAConfig, LoSiATrainer

if __name__ == "__main__":
    place = Path(sys.argv[1])
    data = load_from_disk(str(next(path for path in (place / "prepared").glob("*") if path.is_dir())))
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    settings |= {"seed": 0, "report_to": "none", "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    trainer = LoSiATrainer(
        model=AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32),
        args=TrainingArguments(str(place / "own"), **settings),
        train_dataset=data,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64),
        losia_config=LoSiAConfig.from_dict(json.loads(sys.argv[2])),
    )
    trainer.train()
    trainer.save_model()
    print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
