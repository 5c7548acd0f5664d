"""Pixels of a scene's plan, and PNG bytes of pixels."""

from __future__ import annotations

import random
import struct
import zlib

import numpy as np
from PIL import Image

from .layout import Scene, pick_number
from .sprites import MARGIN, SPRITE_UNITS, UPRIGHT, ground_texture, line_stamp, object_stamp


Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels; x1 and y1 are the first pixels outside

MIN_IMAGE_SIZE = 32
MAX_IMAGE_SIZE = 1024
TEXTURE_SIDES = 2  # a ground texture is this many scenes wide


def draw_ground(rng: random.Random, ground: str, side: int, scale: float) -> np.ndarray:
    """
    A random, randomly turned and slightly tinted piece of a ground, (side, side, 3) uint8.

    Args:
        rng: chooses the piece.
        ground: its kind.
        side: pixels.
        scale: pixels of the picture for one of the plan.

    Returns:
        (side, side, 3) uint8.
    """
    texture = ground_texture(ground, pick_number(rng, 4), max(round(TEXTURE_SIDES * 64 * scale), side), scale)
    span = texture.shape[0] - side + 1
    x, y = pick_number(rng, span), pick_number(rng, span)
    piece = texture[y : y + side, x : x + side]
    light = pick_number(rng, 15) - 7
    tint = [light + pick_number(rng, 9) - 4, light, light + pick_number(rng, 9) - 4]
    assert max(map(abs, tint)) <= MARGIN
    return piece + np.array(tint, np.int16).astype(np.uint8)  # wraps round to a subtraction; no pixel overflows


def draw_objects(image: Image.Image, scene: Scene, side: int, origin: tuple[int, int]) -> list[Box]:
    """
    Paste the objects of a scene of `side` pixels at `origin` of an image; returns their boxes in that image.

    Args:
        image: is painted on.
        scene: the plan.
        side: pixels of the scene.
        origin: its upper left corner in the image, (x, y).

    Returns:
        A box for each object, in pixels of the image.
    """
    scale = side / 64
    half = round(SPRITE_UNITS * scale) / 2
    boxes: dict[int, Box] = {}
    for item in sorted(scene.objects, key=lambda item: -item.cell):  # shadows fall on what lies right of and below
        quarter = 0 if item.kind in UPRIGHT else item.quarter
        pixels, opacity, (x0, y0, x1, y1) = object_stamp(item.kind, item.colour, item.size, item.turn, quarter, scale)
        x = round(origin[0] + (item.cell % 3 + 0.5) * side / 3 + item.shift[0] * scale - half)
        y = round(origin[1] + (item.cell // 3 + 0.5) * side / 3 + item.shift[1] * scale - half)
        image.paste(pixels, (x, y), opacity)
        left, top = max(x + x0, origin[0]), max(y + y0, origin[1])
        boxes[item.cell] = (left, top, min(x + x1, origin[0] + side), min(y + y1, origin[1] + side))
    return [boxes[item.cell] for item in scene.objects]


def draw_scene(rng: random.Random, scene: Scene, side: int) -> tuple[Image.Image, list[Box]]:
    """
    Draw a scene: an RGB image of `side` x `side` pixels and the box of each of its objects.

    Args:
        rng: chooses all that the plan leaves open.
        scene: the plan.
        side: pixels.

    Returns:
        The picture, and a box for each object in pixels.
    """
    image = Image.fromarray(draw_ground(rng, scene.ground, side, side / 64))
    if (line := scene.line) is not None:
        pixels, opacity = line_stamp(line.kind, line.orientation, line.gap, line.variant, side)
        image.paste(pixels, (0, 0), opacity)
    return image, draw_objects(image, scene, side, (0, 0))


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of an RGB image, stored without compression (the parquet file compresses them, 10 times as fast)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = image.size
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row starts with its filter: 0
    rows[:, 1:] = np.asarray(image).reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    data = zlib.compress(rows.tobytes(), 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
