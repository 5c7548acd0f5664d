"""
Loads a staged model folder as a stranger does, for `staging.verify`: run as a file, in a process of its own.

    python clean_process.py FOLDER TEXTS.json IMAGE.png OUTPUT.pt remote|none
"""

import json
import sys

import torch
from PIL import Image


def main(folder: str, texts: str, image: str, output: str, code: str) -> None:
    """
    Writes token ids, pixels and unit embeddings of the texts and the image; `code` is whether to trust the folder's.

    Args:
        folder: the checkpoint.
        texts: JSON list.
        image: file.
        output: file to write.
        code: `remote` trusts the code in the folder.
    """
    sys.modules["modeling_lrsclip"] = None  # any import of the package fails from here on
    from transformers import AutoModel, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=code == "remote")
    model = AutoModel.from_pretrained(folder, trust_remote_code=code == "remote", dtype=torch.float32).eval()
    with open(texts, encoding="utf-8") as file:
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        inputs = processor(text=json.load(file), images=Image.open(image), **options)
    with torch.inference_mode():
        embeds = model(**inputs)
    outputs = {"token ids": inputs["input_ids"], "pixel values": inputs["pixel_values"]}
    outputs |= {"text embeddings": embeds.text_embeds.clone(), "image embeddings": embeds.image_embeds.clone()}
    torch.save(outputs, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
