"""LoSiA in Transformers' Trainer and TRL's."""
