"""Fine-tuning of LRSCLIP: `accelerate launch -m training.train --config training/configs/....yaml`."""
