"""The end of `make demo`: the trained folder through the Auto classes alone, with the code that travels in it."""

import sys

from datasets import load_dataset
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging


logging.disable_progress_bar()
folder, scenes = sys.argv[1:]

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
scenes = load_dataset("parquet", data_files=scenes, split="train[:4]")
inputs = processor(text=list(scenes["long_text"]), images=list(scenes["image"]), return_tensors="pt")
probabilities = model(**inputs).logits_per_image.softmax(dim=-1)

positions = model.config.text_config.max_position_embeddings
print(f"{type(model).__module__}.{type(model).__name__} reads {positions} tokens.")
print("Four scenes (rows) against their four long captions (columns), in percent:")
for row in probabilities.tolist():
    print("  " + " ".join(f"{100 * value:6.1f}" for value in row))
