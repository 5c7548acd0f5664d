"""Attention maps against a slow forward pass by hand; the command."""

import pytest
import torch
from PIL import Image

from evaluation import attention
from evaluation.attention_maps import attention_maps
from modeling_lrsclip.encoding import embed_texts


def by_hand(model, pixel_values, text_embed) -> torch.Tensor:
    """(L,) relevance of all tokens to the class token, with every attention matrix written out."""
    tower = model.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pixel_values))  # (1, L, D)
    matrices = []
    for layer in tower.encoder.layers:
        self_attn, tokens = layer.self_attn, layer.layer_norm1(x)
        width = self_attn.head_dim
        heads = []
        for head in range(self_attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            query, key, value = (
                project(tokens)[0, :, part] for project in (self_attn.q_proj, self_attn.k_proj, self_attn.v_proj)
            )  # (L, D/A)
            weights = torch.softmax(query @ key.T / width**0.5, dim=-1)  # (L, L)
            weights.retain_grad()
            matrices.append(weights)
            heads.append(weights @ value)
        x = x + self_attn.out_proj(torch.cat(heads, dim=-1))[None]
        x = x + layer.mlp(layer.layer_norm2(x))
    embed = model.visual_projection(tower.post_layernorm(x[:, 0]))[0]
    torch.dot(embed / embed.norm(), text_embed).backward()
    relevance = torch.eye(x.shape[1])
    for start in range(0, len(matrices), self_attn.num_heads):
        products = [(weights.grad * weights).clamp(min=0) for weights in matrices[start : start + self_attn.num_heads]]
        relevance = relevance + torch.stack(products).mean(0) @ relevance
    return relevance[0].detach()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_the_slow_pass(tiny_model, tiny_processor, images, short_texts, implementation):
    tiny_model.set_attn_implementation(implementation)
    tiny_model.train()
    maps = attention_maps(tiny_model, tiny_processor, images[0], short_texts)
    assert maps.shape == (len(short_texts), 4, 4)
    assert tiny_model.vision_model.config._attn_implementation == implementation and tiny_model.training
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    tiny_model.eval()
    pixel_values = tiny_processor(images=images[0], return_tensors="pt")["pixel_values"]
    embeds = embed_texts(tiny_model, tiny_processor, short_texts)
    for heat, embed in zip(maps, embeds, strict=True):
        patches = by_hand(tiny_model, pixel_values, embed)[1:].view(4, 4)
        patches = patches - patches.min()
        torch.testing.assert_close(heat, patches / patches.max(), atol=1e-4, rtol=0)
    assert not torch.equal(maps[0], maps[1])


def test_the_command(tiny_checkpoint, images, tmp_path, capsys):
    images[0].save(tmp_path / "tile.png")
    command = ["--model", str(tiny_checkpoint), "--image", str(tmp_path / "tile.png"), "--device", "cpu"]
    output = tmp_path / "new" / "attention.png"
    assert attention.main([*command, "--text", "a road", "a tank", "--output", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output) and min(Image.open(output).size) > 400
    (tmp_path / "tile.png").write_bytes(b"no image")
    assert attention.main([*command, "--text", "a road", "--output", str(output)]) == 2
    assert f"error: {tmp_path / 'tile.png'} cannot be read" in capsys.readouterr().err


def test_a_picture_that_is_no_square_is_said_to_be_cut(tiny_checkpoint, tmp_path, capsys):
    Image.new("RGB", (201, 57), "grey").save(tmp_path / "strip.png")
    arguments = ["--model", str(tiny_checkpoint), "--image", str(tmp_path / "strip.png"), "--device", "cpu"]
    assert attention.main([*arguments, "--text", "a road", "--output", str(tmp_path / "attention.png")]) == 0
    assert "the middle square of 201 x 57 pixels" in capsys.readouterr().err
