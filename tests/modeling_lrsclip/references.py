"""The published preprocessing and towers, written again slowly and without fast paths, to compare against."""

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


# ------------------------------------------------------------------------------------------------- the published towers
# openai/CLIP model.py, with the two position tables of Long-CLIP and LRSCLIP, as plain arithmetic on a state dict with
# the published names. (B, S, D) rows of tokens; one attention head at a time.

ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}


def _normalized(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]


def _tower(state: dict, prefix: str, x: torch.Tensor, heads: int, activation: str, causal: bool) -> torch.Tensor:
    length, width = x.shape[1:]
    forbidden = torch.ones(length, length).triu(1).bool() if causal else torch.zeros(length, length).bool()
    for layer in range(len({name.split(prefix)[1].split(".")[0] for name in state if name.startswith(prefix)})):
        block = f"{prefix}{layer}."
        inputs = _normalized(state, f"{block}ln_1", x)
        mixed = inputs @ state[f"{block}attn.in_proj_weight"].T + state[f"{block}attn.in_proj_bias"]
        query, key, value = mixed[..., :width], mixed[..., width : 2 * width], mixed[..., 2 * width :]
        results = []
        for head in range(heads):
            part = slice(head * width // heads, (head + 1) * width // heads)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / (width // heads) ** 0.5  # (B, S, S)
            results.append(scores.masked_fill(forbidden, float("-inf")).softmax(dim=-1) @ value[..., part])
        attended = torch.cat(results, dim=-1)
        x = x + attended @ state[f"{block}attn.out_proj.weight"].T + state[f"{block}attn.out_proj.bias"]
        hidden = _normalized(state, f"{block}ln_2", x) @ state[f"{block}mlp.c_fc.weight"].T
        hidden = ACTIVATIONS[activation](hidden + state[f"{block}mlp.c_fc.bias"])
        x = x + hidden @ state[f"{block}mlp.c_proj.weight"].T + state[f"{block}mlp.c_proj.bias"]
    return x


def published_text_embeds(state: dict, ids: torch.Tensor, heads: int, activation: str) -> torch.Tensor:
    """`(N, L)` ids, padded with 0 as the published code does -> `(N, E)` unit embeddings."""
    table = state["positional_embedding"]
    if "positional_embedding_res" in state:
        first, later = torch.zeros(len(table), 1), torch.zeros(len(table), 1)
        first[:20], later[20:] = 1, 1
        table = table * first + state["positional_embedding_res"] * later
    x = state["token_embedding.weight"][ids] + table[: ids.shape[1]]
    x = _tower(state, "transformer.resblocks.", x, heads, activation, causal=True)
    x = _normalized(state, "ln_final", x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
    embeds = x @ state["text_projection"]
    return embeds / embeds.norm(dim=-1, keepdim=True)


def published_image_embeds(state: dict, pixels: torch.Tensor, heads: int, activation: str) -> torch.Tensor:
    """`(B, 3, H, W)` -> `(B, E)` unit embeddings."""
    kernel = state["visual.conv1.weight"]  # (D, 3, patch, patch)
    patch = kernel.shape[-1]
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, rows, columns, patch, patch)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, rows * columns, 3 * patch * patch)
    x = patches @ kernel.flatten(1).T
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = _normalized(state, "visual.ln_pre", x + state["visual.positional_embedding"])
    x = _tower(state, "visual.transformer.resblocks.", x, heads, activation, causal=False)
    embeds = _normalized(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    return embeds / embeds.norm(dim=-1, keepdim=True)


def published_state(
    vocabulary: int,
    positions: int = 77,
    vision_width: int = 128,
    text_width: int = 64,
    image: tuple[int, int] = (32, 8),
    projection: int = 24,
    two_tables: bool = False,
) -> dict[str, torch.Tensor]:
    """Random weights under the published names: two layers a tower, images of `(pixels, patch)`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 0.1, around: float = 0.0) -> torch.Tensor:
        return around + scale * torch.randn(shape, generator=generator)

    state = {
        "positional_embedding": draw(positions, text_width),
        "text_projection": draw(text_width, projection),
        "logit_scale": torch.tensor(3.5),
        "visual.class_embedding": draw(vision_width),
        "visual.positional_embedding": draw((image[0] // image[1]) ** 2 + 1, vision_width),
        "visual.proj": draw(vision_width, projection),
        "visual.conv1.weight": draw(vision_width, 3, image[1], image[1]),
        "token_embedding.weight": draw(vocabulary, text_width, scale=1.0),
    }
    if two_tables:
        state["positional_embedding_res"] = draw(positions, text_width)
    for name, width in (("ln_final", text_width), ("visual.ln_pre", vision_width), ("visual.ln_post", vision_width)):
        state |= {f"{name}.weight": draw(width, around=1.0), f"{name}.bias": draw(width)}
    for prefix, width in (("", text_width), ("visual.", vision_width)):
        for layer in range(2):
            block = f"{prefix}transformer.resblocks.{layer}."
            state |= {
                f"{block}attn.in_proj_weight": draw(3 * width, width),
                f"{block}attn.in_proj_bias": draw(3 * width),
                f"{block}attn.out_proj.weight": draw(width, width),
                f"{block}attn.out_proj.bias": draw(width),
                f"{block}mlp.c_fc.weight": draw(4 * width, width),
                f"{block}mlp.c_fc.bias": draw(4 * width),
                f"{block}mlp.c_proj.weight": draw(width, 4 * width),
                f"{block}mlp.c_proj.bias": draw(width),
            }
            for norm in ("ln_1", "ln_2"):
                state |= {f"{block}{norm}.weight": draw(width, around=1.0), f"{block}{norm}.bias": draw(width)}
    return state
