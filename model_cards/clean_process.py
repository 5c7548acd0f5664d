"""
Loads a staged model folder as a stranger does, for `staging.verify`: run as a file, in a process of its own.

    python clean_process.py FOLDER TEXTS.json IMAGE.png OUTPUT.pt
"""

import json
import sys

import torch
from PIL import Image


def main(folder: str, texts: str, image: str, output: str) -> None:
    """Writes token ids, pixels and unit embeddings of the texts and the image."""
    sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with open(texts, encoding="utf-8") as file:
        inputs = processor(text=json.load(file), images=Image.open(image), return_tensors="pt")
    with torch.inference_mode():
        embeds = model(**inputs)
    torch.save(
        {
            "token ids": inputs["input_ids"],
            "pixel values": inputs["pixel_values"],
            "text embeddings": embeds.text_embeds.clone(),
            "image embeddings": embeds.image_embeds.clone(),
        },
        output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
