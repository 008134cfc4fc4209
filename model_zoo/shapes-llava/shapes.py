"""Images and questions of easy-VQA's kind, as many as one wants.

easy-VQA shows one shape in one colour on a pale background, 64 by 64 pixels, and asks 107 questions.
What is drawn here was read off its 4,000 training images: shapes are drawn twice as large and
shrunk by a bilinear filter, and a circle is a polygon of 360 corners, as older versions of Pillow drew
it. Rectangles and triangles come out pixel for pixel as there, circles but for a pixel of some rims.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
FINE = 2 * SIZE
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
PALE = (230, 255)  # each channel of the background
SIDE = (16, 64)  # of a shape, on the fine grid

ASK_SHAPE = (
    "what shape does the image contain?",
    "what shape is in the image?",
    "what shape is present?",
)
ASK_COLOUR = ("what color is the {}?", "what is the color of the {}?")
IS_THERE = (
    "does the image contain a {}?",
    "is a {} present?",
    "is there a {} in the image?",
    "is there a {}?",
)
IS_THERE_NOT = (
    "does the image not contain a {}?",
    "is no {} present?",
    "is there not a {} in the image?",
    "is there not a {}?",
)


@dataclass(frozen=True)
class Scene:
    """One image: what is drawn, in which colour, where on the fine grid, how large, on what."""

    shape: str
    colour: str
    background: tuple[int, int, int]
    corner: tuple[int, int]  # left and top; of a triangle left and bottom
    size: tuple[int, int]  # width and height; of circle and triangle the width counts


def draw_scene(draw: random.Random) -> Scene:
    """A scene as easy-VQA's are spread: everything uniform, the shape within the image."""
    shape = draw.choice(SHAPES)
    width, height = draw.randint(*SIDE), draw.randint(*SIDE)
    if shape == "circle":
        height = width
    if shape == "triangle":
        height = math.ceil(width * math.sqrt(3) / 2)
    left, top = draw.randint(0, FINE - width), draw.randint(0, FINE - height)
    background = (draw.randint(*PALE), draw.randint(*PALE), draw.randint(*PALE))
    corner = (left, top + height if shape == "triangle" else top)
    return Scene(shape, draw.choice(list(COLOURS)), background, corner, (width, height))


def paint(scene: Scene) -> np.ndarray:
    """(64, 64, 3) uint8."""
    image = Image.new("RGB", (FINE, FINE), scene.background)
    pen, fill = ImageDraw.Draw(image), COLOURS[scene.colour]
    (x, y), (width, height) = scene.corner, scene.size
    if scene.shape == "rectangle":
        pen.rectangle([x, y, x + width, y + height], fill=fill)
    elif scene.shape == "circle":
        pen.polygon(_circle(x, y, width), fill=fill)
    else:
        apex = (x + width / 2, y - width * math.sqrt(3) / 2)
        pen.polygon([(x, y), (x + width, y), apex], fill=fill)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _circle(x: int, y: int, width: int) -> list[tuple[int, int]]:
    """The corners of a circle as Pillow had them before version 8."""
    turns, radius, half = [math.radians(angle) for angle in range(360)], width / 2, width // 2
    return [
        (
            math.floor(x + half + radius * math.cos(turn) + 0.5),
            math.floor(y + half + radius * math.sin(turn) + 0.5),
        )
        for turn in turns
    ]


def open_questions(shape: str, colour: str) -> list[tuple[str, str]]:
    """The eight questions that are not yes/no and make sense for this image, with their answers."""
    asked = [(question, shape) for question in (*ASK_SHAPE, f"what is the {colour} shape?")]
    things = ("shape", shape)
    return asked + [(one.format(thing), colour) for one in ASK_COLOUR for thing in things]


def yes_no_questions(shape: str, colour: str, negated: bool) -> list[tuple[str, str]]:
    """The 44 questions whether something is there, or not there, with their answers for this image."""
    found = []
    for thing in (*(f"{one} shape" for one in COLOURS), *SHAPES):
        there = thing in (shape, f"{colour} shape")
        answer = "yes" if there != negated else "no"
        asked = IS_THERE_NOT if negated else IS_THERE
        found += [(question.format(thing), answer) for question in asked]
    return found


def is_open(answer: str) -> bool:
    """Is this the answer to a question that is not yes/no?"""
    return answer not in ("yes", "no")
