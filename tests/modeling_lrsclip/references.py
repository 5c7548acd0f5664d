"""The published preprocessing, written again slowly and without its libraries' fast paths, to compare against."""

import html

import ftfy
import numpy as np
import regex
import torch
from PIL import Image


# openai/CLIP simple_tokenizer.py; the published LRSCLIP code ships it unchanged.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def byte_symbols() -> dict[int, str]:
    """One printable character per byte (GPT-2's table): printable bytes stand for themselves, the others follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def slow_token_ids(text: str, vocab: dict[str, int], merges: list[tuple[str, str]], limit: int) -> list[int]:
    """Clean, split into words, merge the best pair again and again, wrap in start and end, cut with the end put back."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    symbols, ranks = byte_symbols(), {pair: rank for rank, pair in enumerate(merges)}
    ids = [vocab["<|startoftext|>"]]
    for word in WORDS.findall(text):
        pieces = [symbols[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while True:
            pairs = [pair for pair in zip(pieces, pieces[1:]) if pair in ranks]
            if not pairs:
                break
            best = min(pairs, key=ranks.get)
            merged, position = [], 0
            while position < len(pieces):
                if tuple(pieces[position : position + 2]) == best:
                    merged.append("".join(best))
                    position += 2
                else:
                    merged.append(pieces[position])
                    position += 1
            pieces = merged
        ids += [vocab[piece] for piece in pieces]
    ids.append(vocab["<|endoftext|>"])
    return ids if len(ids) <= limit else ids[: limit - 1] + ids[-1:]


def published_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """`(3, size, size)`: torchvision's Resize (PIL bicubic), CenterCrop, ToTensor and Normalize, by their documentation."""
    width, height = image.size
    if width <= height:
        image = image.resize((size, int(size * height / width)), Image.BICUBIC)
    else:
        image = image.resize((int(size * width / height), size), Image.BICUBIC)
    left, top = int(round((image.width - size) / 2.0)), int(round((image.height - size) / 2.0))
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return (pixels - mean) / std
