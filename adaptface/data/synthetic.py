"""Synthetic faces: no person, no licence, any size, with known domain labels.

A face is a curved surface with a colour: rows of constant height, columns of constant angle around the head. About
fifty traits, drawn from the identity's seed, shape and colour it; a `Nuisance` says how it was photographed. One image:

    traits -> surface at 25 and at 80 years (cached) -> mix by age, expression -> light and cast shadow
    -> turn, hide what lies behind, project (two one-dimensional passes) -> background -> align -> blur, noise, JPEG

Whatever is random comes from PCG64 streams of the given seeds, so the traits, labels and pairs are the same everywhere;
pixels are the same up to the last bit of a platform's `exp` and `sin` (and its JPEG decoder).

    python -m adaptface.data.synthetic OUT --num_identities 200 --size 112
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DOMAINS = ("general", "pose", "age")
POSE_YAW = 40.0  # degrees: an image turned at least this far is "pose"
OLD_AGE = 55.0  # years: an image (that is no "pose") of at least this age is "age"
IMAGE_DOMAINS = ("general", "pose", "general", "age")  # the domains of an identity's images, over and over
FOLDS = 10
PARAMETERS_FILE = "synthetic.json"
RENDERER_VERSION = 1  # a change of the pictures changes this number, so that an older set is not taken for a new one

# The ArcFace template at 112 px (left eye, right eye, nose, left and right mouth corner), as complex numbers x + iy.
TEMPLATE = np.array(
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)
YOUNG, OLD = 25.0, 80.0  # the two ages of which an image is a mix

# Traits of an identity: mean and standard deviation. Lengths are in pixels of the 112 px template, y = 0 the eyes.
TRAITS: dict[str, tuple[float, float]] = {
    "head_width": (41.5, 2.4), "head_depth": (44.0, 1.5), "crown": (-60.0, 3.0), "squareness": (2.35, 0.2),
    "jaw_width": (33.0, 3.0), "jaw_corner": (36.0, 3.0), "chin_y": (60.0, 3.0), "chin_width": (14.5, 3.0),
    "chin_out": (2.5, 1.6), "chin_cleft": (0.3, 0.7), "cheekbone": (1.8, 1.2), "cheek_hollow": (1.2, 1.3),
    "fullness": (0.0, 1.0), "forehead": (0.0, 1.2),
    "eye_x": (17.4, 1.25), "eye_y": (0.0, 0.8), "eye_width": (7.6, 0.8), "eye_height": (3.5, 0.65),
    "eye_tilt": (0.04, 0.09), "eye_depth": (3.6, 1.2), "lid_crease": (2.3, 0.9), "iris": (3.3, 0.25),
    "brow_y": (-10.0, 1.5), "brow_thick": (1.9, 0.6), "brow_arch": (1.6, 1.2), "brow_tilt": (0.02, 0.06),
    "brow_in": (8.5, 1.3), "brow_out": (10.5, 1.2), "brow_ridge": (1.4, 1.1), "brow_dark": (0.75, 0.15),
    "nose_tip_y": (20.5, 1.9), "nose_height": (11.5, 2.1), "nose_bridge": (3.2, 1.4), "nose_width": (6.6, 1.2),
    "bridge_width": (4.0, 0.7), "nose_hump": (0.4, 1.1), "nose_up": (0.0, 0.9), "nose_bend": (0.0, 0.5),
    "mouth_y": (40.5, 1.6), "mouth_width": (13.8, 1.7), "lip_upper": (2.9, 0.85), "lip_lower": (4.0, 1.0),
    "cupid": (0.35, 0.2), "mouth_curve": (0.3, 0.9), "mouth_tilt": (0.0, 0.02), "muzzle": (3.6, 1.3),
    "lip_red": (0.5, 0.2),
    "ear_size": (4.0, 1.5), "ear_y": (8.0, 2.0), "hair_front": (-35.0, 4.5), "widow_peak": (0.0, 2.5),
    "temple": (9.0, 4.0), "hair_thick": (4.0, 1.8), "hair_part": (0.0, 0.4), "redness": (0.5, 0.3),
    "under_eye": (0.4, 0.25),
}  # fmt: skip
SKIN = np.array([[238, 200, 180], [226, 182, 152], [205, 152, 118], [166, 114, 84], [122, 80, 58], [84, 56, 42]])
HAIR = np.array([[22, 19, 18], [48, 34, 27], [88, 60, 40], [120, 66, 40], [168, 128, 82], [206, 178, 130]])
IRIS = np.array([[58, 36, 24], [92, 60, 34], [104, 106, 60], [96, 128, 116], [100, 138, 172], [120, 132, 144]])


@dataclass(frozen=True)
class Nuisance:
    """How a face was photographed: everything that is not identity.

    Attributes:
        yaw, pitch, roll (`float`): turn of the head in degrees, positive to the image's right, down, and clockwise;
            `roll` is what the alignment left over.
        age (`float`): years, 18 to 85.
        light_azimuth, light_elevation (`float`): where the light comes from, degrees from the camera, right and up.
        light_strength (`float`): share of the directed light, 0 (flat) to 1 (hard); the "illumination" of metadata.csv.
        warmth (`float`): colour of the light, -1 (blue) to 1 (yellow).
        exposure (`float`): factor on the light, 1 is well exposed.
        smile, mouth_open (`float`): expression, 0 to 1.
        glasses (`int`): 0 none, 1 thin frame, 2 thick frame.
        shift_x, shift_y, scale (`float`): error of the alignment in pixels at 112 px and as a factor.
        blur (`float`): sigma in pixels at 112 px.
        low_resolution (`float`): factor by which the picture was shrunk and enlarged again, 1 for not at all.
        noise (`float`): standard deviation of the sensor noise in grey levels.
        jpeg (`int`): JPEG quality, 0 for no JPEG.
        seed (`int`): seed of the background and of the noise.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    age: float = 30.0
    light_azimuth: float = 15.0
    light_elevation: float = 30.0
    light_strength: float = 0.4
    warmth: float = 0.0
    exposure: float = 1.0
    smile: float = 0.0
    mouth_open: float = 0.0
    glasses: int = 0
    shift_x: float = 0.0
    shift_y: float = 0.0
    scale: float = 1.0
    blur: float = 0.0
    low_resolution: float = 1.0
    noise: float = 0.0
    jpeg: int = 0
    seed: int = 0

    @property
    def domain(self) -> str:
        """`str`: the one of `DOMAINS` that the values belong to; a strong turn goes before a high age."""
        if abs(self.yaw) >= POSE_YAW:
            return "pose"
        return "age" if self.age >= OLD_AGE else "general"


def draw_nuisance(rng: np.random.Generator, domain: str) -> Nuisance:
    """Draws how an image of `domain` was photographed; light, expression and quality vary in every domain.

    Args:
        rng (`numpy.random.Generator`): source of the values.
        domain (`str`): one of `DOMAINS`.
    Returns:
        `Nuisance`: its `domain` is the one asked for.
    Raises:
        ValueError: `domain` is none of `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}: choose one of {', '.join(DOMAINS)}")
    between = rng.uniform
    yaw = rng.choice([-1, 1]) * between(45, 68) if domain == "pose" else np.clip(rng.normal(0, 14), -32, 32)
    return Nuisance(
        yaw=float(yaw),
        pitch=float(np.clip(rng.normal(0, 7), -16, 16)),
        roll=float(rng.normal(0, 2.5)),
        age=float(between(60, 82) if domain == "age" else between(20, 40)),
        light_azimuth=float(between(-80, 80)),
        light_elevation=float(between(-15, 65)),
        light_strength=float(between(0.1, 0.85)),
        warmth=float(np.clip(rng.normal(0, 0.5), -1, 1)),
        exposure=float(np.exp(between(-0.4, 0.35))),
        smile=float(max(0.0, between(-0.6, 1))),
        mouth_open=float(max(0.0, between(-1.2, 1))),
        glasses=int(rng.choice(3, p=[0.8, 0.1, 0.1])),
        shift_x=float(rng.normal(0, 1.2)),
        shift_y=float(rng.normal(0, 1.2)),
        scale=float(np.exp(rng.normal(0, 0.025))),
        blur=float(max(0.0, between(-0.6, 1.1))),
        low_resolution=float(max(1.0, between(-0.5, 2.6))),
        noise=float(between(0, 7)),
        jpeg=int(rng.integers(50, 95)) if between() < 0.6 else 0,
        seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class _Surface:
    """A head: `points` (3, R, C) x right, y down, z to the camera; `colour` (3, R, C) linear; `gloss` (R, C)."""

    points: np.ndarray
    colour: np.ndarray
    gloss: np.ndarray


@dataclass(frozen=True)
class _Head:
    """What is cached of an identity: the young surface, the way from there to the old one, and helpers of the mouth."""

    young: _Surface
    ageing: _Surface
    angles: np.ndarray  # (C,) angle of each column around the head, radians, 0 in front
    landmarks: np.ndarray  # (5, 3) in the order of TEMPLATE
    smile: np.ndarray  # (3, R, C) movement of the points at smile = 1
    open: np.ndarray  # (R, C) movement of y at mouth_open = 1
    inside: np.ndarray  # (R, C) 1 between the lips
    traits: dict[str, float]


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _bump(*scaled: np.ndarray) -> np.ndarray:
    """A Gaussian hill; the arguments are distances divided by widths."""
    return np.exp(-sum(s * s for s in scaled))


def _step(x: np.ndarray) -> np.ndarray:
    """0 below -1/2, 1 above 1/2, straight between."""
    return np.clip(x + 0.5, 0.0, 1.0)


def _noise(rng: np.random.Generator, cells: tuple[int, int], shape: tuple[int, int]) -> np.ndarray:
    """Smooth noise of about unit variance: a random grid of `cells`, enlarged to `shape`."""
    grid = rng.standard_normal(cells, dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC))


def _curve(ys: np.ndarray, width: float, knots: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The broken line through `knots` and `values` at `ys`, rounded over +-`width`."""
    shifts = np.linspace(-width, width, 7)
    return np.mean([np.interp(ys + shift, knots, values) for shift in shifts], axis=0).astype(np.float32)


def _palette(colours: np.ndarray, position: float) -> np.ndarray:
    """Linear colour (3, 1, 1) at `position` 0..1 along 8-bit colours; light is the square of what is shown."""
    steps = np.linspace(0, 1, len(colours))
    return _colour(*(np.interp(position, steps, colours[:, c]) for c in range(3)))


def _colour(red: float, green: float, blue: float) -> np.ndarray:
    """Linear colour (3, 1, 1) of 8-bit values."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1) ** 2 / 255**2


def draw_traits(identity_seed: int) -> dict[str, float]:
    """The traits of an identity.

    Args:
        identity_seed (`int`): not negative; the same seed is the same identity.
    Returns:
        `dict[str, float]`: the names of `TRAITS`, and `skin`, `hair`, `iris_colour` (positions in the palettes, 0..1),
        `male`, `bald`, `fringe`, `long_hair`, `beard`, `moustache` and `freckles` (0..1).
    """
    rng = _rng(identity_seed, 1)
    traits = {name: mean + std * float(np.clip(rng.normal(), -2.2, 2.2)) for name, (mean, std) in TRAITS.items()}
    skin, male = float(rng.uniform()), float(rng.uniform() < 0.5)
    light_hair = rng.uniform() < 0.85 - skin
    chance = rng.uniform(size=6)
    traits |= {
        "skin": skin,
        "hair": float(rng.uniform(0.25, 1.0) if light_hair else rng.uniform(0.0, 0.3)),
        "iris_colour": float(rng.uniform(0.0, 1.0) if light_hair else rng.uniform(0.0, 0.25)),
        "male": male,
        "bald": float(male and chance[0] < 0.12),
        "fringe": float(chance[1] < (0.08 if male else 0.3)),
        "long_hair": float(chance[2] < (0.06 if male else 0.65)),
        "beard": float(rng.uniform(0.25, 1.0)) if male and chance[3] < 0.4 else 0.0,
        "moustache": float(rng.uniform(0.3, 1.0)) if male and chance[4] < 0.4 else 0.0,
        "freckles": float(rng.uniform(0.3, 1.0)) if chance[5] < 0.3 and skin < 0.5 else 0.0,
    }
    traits["brow_thick"] += 0.3 * male
    traits["jaw_width"] += 1.5 * male - 0.7
    traits["lip_red"] += 0.1 - 0.15 * male
    return traits


def _surface(t: dict[str, float], seed: int, ys: np.ndarray, angles: np.ndarray, old: bool) -> _Surface:
    """Builds the head of traits `t` on the grid of heights `ys` (R,) and `angles` (C,), at 25 or at 80 years."""
    rng = _rng(seed, 2)  # the same stream at both ages, so that moles and strands of hair stay where they are
    shape = (len(ys), len(angles))
    y, u = ys[:, None], angles[None, :]
    side = np.abs(u)
    sin, cos = np.sin(u), np.cos(u)
    aged = float(old)

    # Head: in each row the larger of the face's and the neck's oval.
    jaw = _curve(
        ys, 4.5,
        [5, t["jaw_corner"] - 12, t["jaw_corner"], t["jaw_corner"] + 0.6 * (t["chin_y"] - t["jaw_corner"]),
         t["chin_y"] - 2, t["chin_y"] + 3],
        [1, 0.5 + 0.5 * (t["jaw_width"] + 3) / t["head_width"], (t["jaw_width"] + aged) / t["head_width"],
         (0.62 * t["jaw_width"] + 0.38 * t["chin_width"] + 2 * aged) / t["head_width"],
         t["chin_width"] / t["head_width"], 0.1],
    )  # fmt: skip
    top = np.clip((ys + 8) / (t["crown"] + 8), 0, 1)
    dome = np.sqrt(np.clip(1 - top**2.6, 0.0004, 1))
    width = (t["head_width"] + 0.6 * t["fullness"]) * np.where(ys < 0, dome, jaw)
    under = np.clip((ys - t["chin_y"] + 4) / 7, 0, 1)
    depth = (t["head_depth"] + t["forehead"] * np.clip(-ys / 30, 0, 1)) * np.where(
        ys < 0, dome**0.8, 1 - 0.55 * under**2
    )
    power = t["squareness"]
    across = np.abs(sin) ** power, np.abs(cos) ** power
    face = (across[0] / width[:, None] ** power + across[1] / depth[:, None] ** power) ** (-1 / power)
    behind = np.clip(-cos, 0, 1)
    face = face * (1 + 0.25 * behind**2) * (1 - np.clip(2.5 * behind, 0, 1) * np.clip((y - 16) / 40, 0, 0.7))
    neck_width = 25.0 + 2.5 * t["male"]
    neck = 1 / np.sqrt((sin / neck_width) ** 2 + (cos / 22.0) ** 2) * _step((y - 20) / 20)
    radius = np.maximum(face, neck)

    # Hair: above the hair line, thicker than the skin; long hair falls beside the face.
    strands = _noise(rng, (7, 75), shape)
    front = t["hair_front"] + 13 * t["fringe"] - 25 * t["bald"] - 5 * aged * t["male"]
    line = _curve(
        side[0], 0.0, [0.0, 0.12, 0.55, 0.95, 1.15, 1.3, 1.42, 1.78, 1.86, 2.0],
        [front + t["widow_peak"], front, front + 0.1 * t["temple"] + 3 * t["fringe"],
         front + t["temple"] + 6 * t["fringe"],
         -14 - 6 * t["bald"], -4 + 0.3 * t["temple"], -6, -4, 26, 36],
    )  # fmt: skip
    line = line + 5 * t["hair_part"] * angles + 0.7 * strands * (0.6 + t["fringe"])
    hair = _step((line - y) / 2.5)
    if t["long_hair"]:
        curtain = _step((side - 1.22 + 0.004 * y - 0.05 * strands) / 0.1) * _step((y + 25) / 10)
        radius = np.maximum(radius, curtain * (t["head_width"] + 1.0 + 0.05 * np.clip(y, 0, 60)))
        hair = np.maximum(hair, curtain)
    ear = _bump((side - 1.6 - 0.006 * (y - t["ear_y"])) / 0.13) * _step((11 - np.abs(y - t["ear_y"])) / 5) * (1 - hair)
    radius = radius + ear * t["ear_size"] * (1.1 + 0.15 * aged)
    radius = radius + hair * (t["hair_thick"] * (1 - 0.6 * t["bald"]) * (1 - 0.3 * aged) + 0.5 * strands)

    # Relief of the face, in front of the oval. `x` is the place seen from the front.
    x = radius * sin
    ax = np.abs(x)
    bare = 1 - hair
    front_only = np.clip(cos * 2.0, 0, 1)
    eye_x, eye_y = t["eye_x"], t["eye_y"]
    tip = t["nose_tip_y"] + 1.0 * aged
    mouth_y, mouth_w = t["mouth_y"] + 0.6 * aged, t["mouth_width"]
    ridge = _curve(
        ys, 2.0, [-14, -5, 4, tip - 5, tip - 1, tip + 2.5, tip + 6 - t["nose_up"], tip + 9],
        [0.3, t["nose_bridge"], t["nose_bridge"] + 2 + t["nose_hump"], t["nose_height"] - 2.2 + 0.5 * t["nose_hump"],
         t["nose_height"], t["nose_height"] - 1.5, 2.0, 0],
    )  # fmt: skip
    ridge_width = _curve(
        ys, 0.0, [-8, 2, tip - 6, tip, tip + 6], [6, *[t["bridge_width"]] * 2, 0.72 * t["nose_width"], 6]
    )
    nose_x = x - t["nose_bend"] * np.clip((y + 5) / 20, 0, 1.2)
    wings = _bump((np.abs(nose_x) - 0.92 * t["nose_width"]) / 2.6, (y - tip - 1.5) / 3.2)
    mouth = y - mouth_y - t["mouth_tilt"] * x + t["mouth_curve"] * ((x / mouth_w) ** 2 - 0.3)
    arc = np.clip(1 - (x / mouth_w) ** 2, 0, 1)
    upper = (t["lip_upper"] - 0.9 * aged) * arc**0.8 * (1 - t["cupid"] * _bump(x / 2.2)) + 0.01
    lower = (t["lip_lower"] - 1.0 * aged) * arc**0.7 + 0.01
    sag = _bump((ax - 21) / 7, (y - t["chin_y"] + 12) / 7)
    fold = _bump((ax - 9.0 - 0.42 * (y - tip)) / 1.6) * _step((y - tip + 1) / 4) * _step((mouth_y + 6 - y) / 8)
    forehead_lines = _bump(np.sin((y + 0.004 * x**2 + 24) * 2 * np.pi / 6.2) / 0.33) * _bump(x / 22, (y + 23) / 9)
    crow = _bump(np.sin((y - eye_y) * 0.9 + 0.12 * (ax - eye_x)) / 0.35) * _bump((ax - eye_x - 13) / 4, (y - eye_y) / 7)
    bags = _bump((ax - eye_x + 1) / 6.5, (y - eye_y - 8) / 1.5)
    wrinkles = (0.9 * forehead_lines + 0.8 * crow + 1.2 * fold + 0.8 * bags) * bare * front_only
    relief = (
        ridge[:, None] * _bump(nose_x / ridge_width[:, None])
        + 0.38 * t["nose_height"] * wings
        - t["eye_depth"] * _bump((ax - eye_x + 1.5) / 10, (y - eye_y) / 6.5)
        + 1.7 * _bump((ax - eye_x) / 6.0, (y - eye_y) / 4.2)
        + t["brow_ridge"] * _bump((ax - eye_x + 3) / 12, (y - t["brow_y"] - 1) / 4)
        + t["cheekbone"] * _bump((ax - 24) / 9, (y - 14) / 8)
        - (t["cheek_hollow"] - 0.8 * t["fullness"] + 0.9 * aged) * _bump((ax - 25) / 8, (y - 34) / 9)
        + t["muzzle"] * _bump(x / 15, (y - mouth_y + 1) / 10)
        + 1.3 * _bump(x / mouth_w, (mouth + 0.6 * upper) / 2.0)
        + 1.7 * _bump(x / mouth_w, (mouth - 0.6 * lower) / 2.4)
        - 1.4 * _bump(x / (0.75 * mouth_w), mouth / 0.9)
        - 1.3 * _bump(x / 9, (y - mouth_y - 9) / 3)
        + t["chin_out"] * _bump(x / 9.5, (y - t["chin_y"] + 6) / 5.5)
        - t["chin_cleft"] * _bump(x / 1.6, (y - t["chin_y"] + 5) / 5)
        + 2.2 * aged * sag
        - 0.9 * aged * wrinkles
    ) * (front_only * bare)
    points = np.stack(np.broadcast_arrays(x, y, radius * cos + relief)).astype(np.float32)

    # Colour of the skin.
    base = _palette(SKIN, t["skin"])
    tone = 1 + 0.05 * _noise(rng, (9, 12), shape) + 0.05 * _noise(rng, (40, 50), shape) * (1 + aged)
    blotch = np.clip(_noise(rng, (26, 34), shape) - 1.0, 0, 1)
    freckle = np.clip(_noise(rng, (60, 80), shape) - 0.5, 0, 1) * _bump(ax / 26, (y - 12) / 13)
    red = t["redness"] * (
        _bump((ax - 22) / 9, (y - 18) / 9)
        + 0.8 * _bump(nose_x / 6, (y - tip) / 5)
        + ear
        + 0.3 * _bump(x / 9, (y - 54) / 6)
    )
    dark = (
        0.28 * t["under_eye"] * (1 + aged) * _bump((ax - eye_x + 1.5) / 6.5, (y - eye_y - 5.5) / 2.6)
        + 0.18 * _bump((ax - eye_x + 3) / 9, (y - eye_y + 4) / 4)
        + 0.20 * _bump(x / 7, (y - tip - 8) / 3)
        + 0.16 * _bump(x / 9, (y - mouth_y - lower - 2.5) / 2)
        + 0.45 * _step((y - t["chin_y"] - 1 + 0.02 * x**2) / 8)
        + 0.35 * _bump((line - y + 1) / 3.5) * bare
        + 0.55 * _bump((side - 1.56) / 0.05, (y - t["ear_y"]) / 6)
        + 0.25 * _bump((side - 1.47) / 0.03) * ear
        + 0.35 * aged * wrinkles
        + (0.35 * t["freckles"]) * freckle
        + 0.30 * aged * blotch
    )
    for place in rng.uniform([-30, -28], [30, 55], size=(4, 2))[: rng.integers(0, 5)]:
        dark = dark + 0.75 * _bump((x - float(place[0])) / 1.1, (y - float(place[1])) / 1.1) * front_only
    blush = np.array([0.10, -0.22, -0.20], np.float32).reshape(3, 1, 1)
    colour = base * (1 - 0.08 * aged) * (np.clip(1 - dark, 0.15, 1) * tone) * (1 + red * blush)

    def paint(mask: np.ndarray, new: np.ndarray | float) -> None:
        nonlocal colour
        colour += np.clip(mask, 0, 1) * (new - colour)

    # Beard, lips, nostrils, brows, eyes, hair, in this order.
    hair_colour = _palette(HAIR, t["hair"])
    hair_colour = hair_colour + aged * 0.75 * (_colour(196, 196, 194) - hair_colour)
    bristle = _noise(rng, (90, 110), shape)
    jaw_line = _step((y - mouth_y + 16 - 0.9 * np.clip(ax - 8, 0, 26)) / 8) if t["beard"] else np.zeros(shape)
    beard = t["beard"] * jaw_line * _step((ax - 0.9 * mouth_w + 2 * np.clip(y - mouth_y - 6, 0, 8)) / 5)
    beard = beard * _step((t["chin_y"] + 6 - y) / 6)
    moustache = (
        t["moustache"] * _step((y - tip - 6.5) / 2) * _step((mouth_w + 2 - ax) / 4) * _step((mouth_y - upper - y) / 1.5)
    )
    paint((np.maximum(beard, moustache)) * (0.75 + 0.35 * bristle) * front_only, 0.85 * hair_colour)
    lips = _step((mouth + upper) / 0.9) * _step((lower - mouth) / 0.9) * _step((mouth_w - ax) / 1.2) * front_only
    lip_colour = base * np.array([0.92, 0.50, 0.52], np.float32).reshape(3, 1, 1) ** (0.4 + t["lip_red"])
    paint(0.85 * lips, lip_colour * (0.82 + 0.18 * _step(mouth / 1.5)))
    paint(0.85 * _bump(mouth / 0.75) * _step((mouth_w + 0.5 - ax) / 2) * front_only, 0.12 * lip_colour)
    paint(0.85 * _bump((np.abs(nose_x) - 0.5 * t["nose_width"]) / 1.7, (y - tip - 5) / 1.25) * front_only, 0.08 * base)
    paint(0.3 * _bump((np.abs(nose_x) - 1.25 * t["nose_width"]) / 1.0, (y - tip - 2) / 3.2) * front_only, 0.3 * base)

    out = ax - eye_x  # from the middle of the eye outwards
    brow_place = np.clip((out + t["brow_in"]) / (t["brow_in"] + t["brow_out"]), 0, 1)
    brow_line = (
        t["brow_y"] + 0.8 * aged - t["brow_tilt"] * out * 4 - t["brow_arch"] * (1 - ((brow_place - 0.62) / 0.5) ** 2)
    )
    brow_half = t["brow_thick"] * (1.05 - 0.75 * brow_place**2)
    brow = (
        _step((brow_half - np.abs(y - brow_line)) / 1.3)
        * _step((out + t["brow_in"]) / 2)
        * _step((t["brow_out"] - out) / 2)
    )
    paint(t["brow_dark"] * brow * (0.85 + 0.3 * bristle) * front_only * bare, 0.55 * hair_colour)

    eye_w, eye_h = t["eye_width"], t["eye_height"] * (1 - 0.18 * aged)
    down = y - eye_y + t["eye_tilt"] * out
    opening = np.clip(1 - (out / eye_w) ** 2, 0, 1)
    lid_upper = -1.1 * eye_h * opening**0.75
    lid_lower = 0.75 * eye_h * opening
    eye = (
        _step((down - lid_upper) / 0.8)
        * _step((lid_lower - down) / 0.8)
        * _step((eye_w - np.abs(out)) / 1)
        * front_only
    )
    disc = np.sqrt(out**2 + (down + 0.12 * eye_h) ** 2)
    white = _colour(200, 194, 189) * (1 - 0.35 * _bump((down - lid_upper) / 1.3))
    paint(
        0.4 * _bump((down - lid_upper + t["lid_crease"]) / 0.75) * _step((eye_w + 1 - np.abs(out)) / 3) * front_only,
        0.35 * base,
    )
    paint(eye, white)
    paint(eye * _step((t["iris"] - disc) / 0.9), _palette(IRIS, t["iris_colour"]))
    paint(eye * 0.6 * _bump((disc - t["iris"]) / 0.6), 0.0)
    paint(eye * _step((1.45 - disc) / 0.9), 0.004)
    paint(eye * _bump((x - np.sign(x) * eye_x + 1.0) / 0.7, (down + 1.5) / 0.7), 0.9)
    lash = _bump((down - lid_upper) / (0.75 + 0.25 * (1 - t["male"]))) * _step((eye_w + 0.8 - np.abs(out)) / 1.5)
    paint((0.85 * lash + 0.35 * _bump((down - lid_lower) / 0.6) * (opening > 0)) * front_only, 0.012)

    locks = np.clip(1 + 0.28 * strands + 0.12 * bristle, 0.3, 2)
    paint(hair * (1 - 0.25 * t["bald"]), hair_colour * locks)
    gloss = 0.10 * (1 - 0.5 * aged) * bare + 0.05 * hair + 0.1 * lips
    return _Surface(points, colour, gloss)


@lru_cache(maxsize=4)
def _head(identity_seed: int, size: int) -> _Head:
    t = draw_traits(identity_seed)
    rows, columns = round(1.25 * size), round(1.35 * size)
    between_lips = t["mouth_y"] + np.linspace(-0.7, 0.7, 8)  # so that an open mouth has something to show
    ys = np.sort(np.concatenate([np.linspace(t["crown"], 80, rows), between_lips])).astype(np.float32)
    spread = np.linspace(-1, 1, columns)
    angles = ((0.5 * spread + 0.5 * spread**3) * np.radians(165)).astype(np.float32)  # denser in front
    young, aged = (_surface(t, identity_seed, ys, angles, old) for old in (False, True))
    ageing = _Surface(aged.points - young.points, aged.colour - young.colour, aged.gloss - young.gloss)

    x, y, _ = young.points
    ax = np.abs(x)
    front = np.clip(np.cos(angles) * 2, 0, 1)[None, :]
    mouth_y, mouth_w = t["mouth_y"], t["mouth_width"]
    corner = _bump((ax - mouth_w) / 6, (y - mouth_y) / 6) * front
    mouth_area = _bump(x / (1.3 * mouth_w), (y - mouth_y) / 8) * front
    cheek = _bump((ax - 20) / 8, (y - 20) / 8) * front
    smile = np.stack([np.sign(x) * 2.6 * corner, -3.2 * corner + 0.8 * mouth_area - 1.2 * cheek, 1.8 * cheek - corner])
    gape = np.clip(1 - (x / (mouth_w - 0.5)) ** 2, 0, 1) ** 0.6
    fall = np.clip((y - mouth_y) / 1.2 + 0.5, 0, 1)
    jaw = 0.75 * np.clip((y - mouth_y - 4) / 12, 0, 1)
    opening = 9.0 * front * fall * (gape * (1 - jaw) + jaw * _step((60 - ax) / 60)) * np.clip((95 - y) / 30, 0, 1)
    inside = _step((0.9 - np.abs(y - mouth_y)) / 0.3) * _step((mouth_w - 1 - ax) / 2) * front

    spots = [
        (-t["eye_x"], t["eye_y"]),
        (t["eye_x"], t["eye_y"]),
        (0.0, t["nose_tip_y"]),
        (-mouth_w, mouth_y),
        (mouth_w, mouth_y),
    ]
    places = [np.unravel_index(np.argmin((x - a) ** 2 + (y - b) ** 2 + 1e4 * (front == 0)), x.shape) for a, b in spots]
    landmarks = np.array([young.points[:, row, column] for row, column in places])
    return _Head(young, ageing, angles, landmarks, smile, opening, inside, t)


def _hide(position: np.ndarray, start: int) -> np.ndarray:
    """Running extremes of each row, away from column `start`, the one nearest to the viewer.

    What lies behind something nearer gets the position of the thing's edge, so that it is squeezed to nothing.
    """
    left = np.minimum.accumulate(position[:, start::-1], axis=1)[:, ::-1]
    return np.concatenate([left[:, :-1], np.maximum.accumulate(position[:, start:], axis=1)], axis=1)


def _resample(position: np.ndarray, values: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation of every row at `targets`.

    Args:
        position (`np.ndarray` of shape `(R, C)`): places of the samples, not falling along a row.
        values (`np.ndarray` of shape `(F, R, C)`): what to interpolate.
        targets (`np.ndarray` of shape `(T,)`): places wanted.
    Returns:
        values of shape `(F, R, T)`, and the share of each target that the row covers, `(R, T)`.
    """
    rows, columns = position.shape
    first, last = position[:, :1], position[:, -1:]
    step = targets[1] - targets[0]
    cover = _step((targets - first) / step) * _step((last - targets) / step)
    apart = np.arange(rows)[:, None] * 1000.0  # one long rising axis, so that one call serves all rows
    wanted = np.clip(targets, first, last) + apart
    index = np.interp(wanted.ravel(), (position + apart).ravel(), np.arange(rows * columns, dtype=np.float64))
    low = np.minimum(index.astype(np.intp), rows * columns - 2)
    share = (index - low).astype(np.float32)
    flat = values.reshape(len(values), -1)
    mixed = flat.take(low, axis=1)
    mixed += share * (flat.take(low + 1, axis=1) - mixed)
    return mixed.reshape(len(values), rows, len(targets)), cover.astype(np.float32)


def _lit(points: np.ndarray, colour: np.ndarray, gloss: np.ndarray, angles: np.ndarray, n: Nuisance) -> np.ndarray:
    """Colour (3, R, C) of the surface under the light: Lambert and a little Blinn, with cast shadows within a row."""
    azimuth, elevation, pitch, yaw = np.radians([n.light_azimuth, n.light_elevation, n.pitch, n.yaw])
    light = np.array([np.sin(azimuth) * np.cos(elevation), -np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    turn = _turn(yaw, pitch)
    light, viewer = turn.T @ light, turn.T @ np.array([0.0, 0.0, 1.0])  # from the camera's frame to the head's
    half = (light + viewer) / np.linalg.norm(light + viewer)

    (ax, ay, az), (dx, dy, dz) = _slope(points, 2), _slope(points, 1)
    nx, ny, nz = ay * dz - az * dy, az * dx - ax * dz, ax * dy - ay * dx
    inverse = 1 / np.sqrt(nx * nx + ny * ny + nz * nz + 1e-6)

    around = float(np.arctan2(light[0], light[2]))
    across = points[0] * np.float32(np.cos(around)) - points[2] * np.float32(np.sin(around))
    lit_share = 1 - np.minimum(np.abs(_hide(across, _nearest(angles, around)) - across) / 2, 1)

    (lx, ly, lz), (hx, hy, hz) = light.astype(np.float32), half.astype(np.float32)
    lambert = np.maximum((nx * lx + ny * ly + nz * lz) * inverse, 0) * lit_share
    shine = np.maximum((nx * hx + ny * hy + nz * hz) * inverse, 0)
    for _ in range(4):
        shine *= shine  # to the power of 16
    ambient = (1 - n.light_strength) * (0.85 - 0.25 * ny * inverse) + 0.10
    tint = np.array([1 + 0.14 * n.warmth, 1.0, 1 - 0.22 * n.warmth], np.float32).reshape(3, 1, 1)
    directed = np.float32(1.5 * n.light_strength) * tint
    return (colour * (ambient + directed * lambert) + directed * (shine * lit_share * gloss)) * np.float32(n.exposure)


def _slope(points: np.ndarray, axis: int) -> np.ndarray:
    """Differences of neighbours along an axis of (3, R, C), the outermost repeated; their length does not matter."""
    inner = np.diff(points, axis=axis)
    first, last = inner.take([0], axis), inner.take([-1], axis)
    return np.concatenate([first, inner], axis) + np.concatenate([inner, last], axis)


def _nearest(angles: np.ndarray, angle: float) -> int:
    """The column that looks towards `angle`, kept off the ends."""
    return int(np.clip(np.searchsorted(angles, angle), 1, len(angles) - 2))


def _turn(yaw: float, pitch: float) -> np.ndarray:
    """Rotation (3, 3) of the head, first about the vertical axis, then about the horizontal one of the camera."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    return np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Linear colours (size, size, 3): soft patches and a few hard-edged ones."""
    cells = int(rng.integers(2, 7))
    grey = rng.uniform(0.02, 0.8, (cells, cells, 1))
    soft = grey * rng.uniform(0.6, 1.4, 3) * rng.uniform(0.75, 1.25, (cells, cells, 3))
    picture = Image.fromarray((255 * np.sqrt(np.minimum(soft, 1))).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 4))):
        x, y, w, h = rng.uniform([-0.2, -0.2, 0.1, 0.1], [1, 1, 0.6, 1.2]) * size
        red, green, blue = (int(c) for c in rng.integers(20, 180) + rng.integers(0, 50, 3))
        draw.rectangle((x, y, x + w, y + h), fill=(red, green, blue))
    return np.square(np.asarray(picture, np.float32) / 255)


def render(identity_seed: int, nuisance: Nuisance, size: int = 112) -> np.ndarray:
    """Draws one aligned face.

    Args:
        identity_seed (`int`): not negative; the same seed is the same person.
        nuisance (`Nuisance`): how the face was photographed.
        size (`int`): side of the picture in pixels, 24 to 512; the face fills it as in an ArcFace crop.
    Returns:
        `np.ndarray` of shape `(size, size, 3)`, uint8, RGB; byte-equal for equal arguments.
    Raises:
        ValueError: a size or seed out of range.
    """
    if not 24 <= size <= 512:
        raise ValueError(f"size must be 24 to 512 pixels, got {size}")
    if identity_seed < 0:
        raise ValueError(f"identity_seed must not be negative, got {identity_seed}")
    n, head = nuisance, _head(identity_seed, size)
    rng = _rng(n.seed, 3)
    unit = size / 112

    # The surface at this age, with this expression.
    share = np.float32((n.age - YOUNG) / (OLD - YOUNG))
    points = head.young.points + share * head.ageing.points
    colour = head.young.colour + share * head.ageing.colour
    gloss = head.young.gloss + share * head.ageing.gloss
    if n.smile > 0:
        points += np.float32(n.smile) * head.smile
    if n.mouth_open > 0:
        teeth = _colour(190, 182, 172)
        mouth = np.where(head.young.points[1] < head.traits["mouth_y"] - 0.05, teeth, teeth * _colour(80, 50, 50))
        colour += (np.float32(min(1.0, 3 * n.mouth_open)) * head.inside) * (mouth - colour)
        points[1] += np.float32(n.mouth_open) * head.open
    if n.glasses:
        _put_on_glasses(colour, points, head.traits, n)
    lit = _lit(points, colour, gloss, head.angles, n)

    # Alignment: the similarity that brings the turned landmarks nearest to the template, and its error.
    yaw, pitch = np.radians([n.yaw, n.pitch])
    turn = _turn(yaw, pitch)
    seen = head.landmarks @ turn.T
    spots = seen[:, 0] + 1j * seen[:, 1]
    centred = spots - spots.mean()
    factor = np.vdot(centred, TEMPLATE - TEMPLATE.mean()) / np.vdot(centred, centred).real
    middle = 56 + 56j
    error = n.scale * np.exp(1j * np.radians(n.roll))
    offset = middle + error * (TEMPLATE.mean() - factor * spots.mean() - middle) + n.shift_x + 1j * n.shift_y
    factor = factor * error
    canvas = round(1.14 * size)  # room to turn the picture
    zoom, rotation = abs(factor), np.angle(factor)
    centre = (middle - offset) / factor
    grid = (np.arange(canvas) + 0.5 - canvas / 2) / (unit * zoom)

    # Projection: places along the rows first, where what is behind (the far cheek) hides; then along the columns.
    (right_x, _, right_z), (down_x, down_y, down_z) = turn[:2].astype(np.float32)
    across = right_x * points[0] + right_z * points[2]
    height = down_x * points[0] + down_y * points[1] + down_z * points[2]
    fields, cover = _resample(
        _hide(across, _nearest(head.angles, -yaw)), np.concatenate([lit, height[None]]), grid + centre.real
    )  # (4, R, X), (R, X)
    fields = np.concatenate([fields, cover[None]]).transpose(0, 2, 1)  # (5, X, R)
    face, cover = _resample(_hide(fields[3], fields.shape[2] // 2), fields[[0, 1, 2, 4]], grid + centre.imag)
    behind = _background(rng, canvas) * np.float32(n.exposure)  # (Y, X, 3)
    picture = behind + (face[3] * cover).T[..., None] * (face[:3].transpose(2, 1, 0) - behind)
    shown = Image.fromarray((255 * np.sqrt(np.clip(picture, 0, 1)) + 0.5).astype(np.uint8))

    cos, sin, half = np.cos(rotation), np.sin(rotation), canvas / 2
    affine = (cos, sin, half - (cos + sin) * size / 2, -sin, cos, half + (sin - cos) * size / 2)
    shown = shown.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return _photographed(shown, n, rng)


def _put_on_glasses(colour: np.ndarray, points: np.ndarray, t: dict[str, float], n: Nuisance) -> None:
    """Paints a frame around the eyes; its shape comes from the image's seed, it is no mark of the identity."""
    rng = _rng(n.seed, 4)
    width, height, power = (float(v) for v in rng.uniform([12.5, 8.5, 2.0], [15.0, 12.5, 5.0]))
    tone = rng.uniform(0.0, 0.1) * rng.uniform(0.5, 1.0, (3, 1, 1)) * (1.0 if n.glasses == 2 else 2.5)
    line = 1.6 if n.glasses == 2 else 1.1
    rows = slice(*np.searchsorted(points[1, :, 0], [-16.0, 18.0]))
    x, y, z = np.abs(points[0, rows]), points[1, rows] - t["eye_y"] - 1.5, points[2, rows]
    ring = (np.abs((x - t["eye_x"]) / width) ** power + np.abs(y / height) ** power) ** (1 / power)
    frame = _step(line - np.abs(ring - 1) * height)
    bridge = _step(line - np.abs(y + 2.5)) * (x < t["eye_x"] - width)
    arm = _step(line - np.abs(y + 3)) * (x > t["eye_x"] + width - 1) * (z < 40)
    mask = np.minimum(frame + bridge + arm, 1) * (z > -10)
    colour[:, rows] += mask * (tone.astype(np.float32) - colour[:, rows])


def _photographed(shown: Image.Image, n: Nuisance, rng: np.random.Generator) -> np.ndarray:
    """Blur, loss of resolution, sensor noise and JPEG, in this order."""
    size = shown.width
    if n.blur > 0:
        shown = shown.filter(ImageFilter.GaussianBlur(n.blur * size / 112))
    if n.low_resolution > 1:
        small = max(8, round(size / n.low_resolution))
        shown = shown.resize((small, small), Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(shown)
    if n.noise > 0:
        noisy = pixels + np.float32(n.noise) * rng.standard_normal(pixels.shape, np.float32)
        pixels = np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    if n.jpeg:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=n.jpeg)
        pixels = np.asarray(Image.open(buffer))
    return np.array(pixels)


def contact_sheet(
    identity_seeds: Sequence[int], nuisances: Sequence[Nuisance] | None = None, size: int = 112, columns: int = 8
) -> Image.Image:
    """Pictures side by side, to look at: a row an identity, a column an image.

    Args:
        identity_seeds (`Sequence[int]`): the rows.
        nuisances (`Sequence[Nuisance]`, *optional*): the columns, the same for every row; `columns` images as
            `write_synthetic` would draw them where None.
        size (`int`): side of a picture in pixels.
    Returns:
        `PIL.Image.Image`: RGB.
    """
    rows = []
    for seed in identity_seeds:
        drawn = nuisances if nuisances is not None else draw_images(seed, columns)
        rows.append(np.concatenate([render(seed, n, size) for n in drawn], axis=1))
    return Image.fromarray(np.concatenate(rows))


def draw_images(identity_seed: int, count: int) -> list[Nuisance]:
    """How the `count` images of an identity are photographed: domains as in `IMAGE_DOMAINS`, over and over."""
    rng = _rng(identity_seed, 5)
    return [draw_nuisance(rng, IMAGE_DOMAINS[i % len(IMAGE_DOMAINS)]) for i in range(count)]


def _draw_pairs(
    seed: int, identity_seeds: Sequence[int], domains: Sequence[str], count: int
) -> Iterator[tuple[int, tuple[int, int], tuple[int, int], bool, str]]:
    """Pairs (fold, (identity, image), (identity, image), same, domain), the images as indices.

    Image a is always "general" and image b of the pair's domain, for genuine and impostor pairs alike, so that the
    conditions do not tell them apart; every other impostor resembles in skin, hair and sex.
    """
    rng = _rng(seed, 6)
    traits = [draw_traits(identity_seed) for identity_seed in identity_seeds]
    looks = np.array([[t["skin"], t["hair"], t["male"], t["long_hair"]] for t in traits])
    alike = np.argsort(np.abs(looks[:, None] - looks[None]).sum(-1), axis=1)[:, 1:6]
    images = {domain: [i for i, d in enumerate(domains) if d == domain] for domain in DOMAINS}
    used = set()
    for fold in range(FOLDS):
        for number in range(count // FOLDS):
            same = number < count // FOLDS // 2
            domain = DOMAINS[(fold + number) % len(DOMAINS)]
            while True:
                one = other = int(rng.integers(len(traits)))
                if not same:
                    near = alike[one] if number % 2 else np.delete(np.arange(len(traits)), one)
                    other = int(rng.choice(near))
                a, b = (one, int(rng.choice(images["general"]))), (other, int(rng.choice(images[domain])))
                if a != b and frozenset((a, b)) not in used:
                    break
            used.add(frozenset((a, b)))
            yield fold, a, b, same, domain


def _write_identity(task: tuple[Path, int, int, int]) -> list[Nuisance]:
    """Renders the images of one identity; a function of the module, so that other processes can run it."""
    folder, identity_seed, count, size = task
    folder.mkdir()
    drawn = draw_images(identity_seed, count)
    for number, nuisance in enumerate(drawn):
        picture = Image.fromarray(render(identity_seed, nuisance, size))
        picture.save(folder / f"{number:03d}.png", compress_level=1)
    return drawn


def _write_csv(path: Path, header: str, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split(","))
        writer.writerows(rows)


def write_synthetic(
    folder: str | Path,
    num_identities: int = 200,
    images_per_identity: int = 8,
    dev_identities: int = 60,
    pairs: int = 600,
    size: int = 112,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
) -> Path:
    """Writes a training set and a development set of other identities, unless the folder holds this very set.

    The folder gets `train/id_0000/000.png ...` and `train/metadata.csv`, `dev/dev_0000/000.png ...` and
    `dev/metadata.csv`, both with the columns file, identity, domain, yaw (degrees), age (years) and illumination
    (share of directed light, 0..1); `dev_pairs.csv` (fold, image_a, image_b, same, domain; ten contiguous folds, half
    of each genuine, paths relative to `dev/`); and `synthetic.json`, the parameters. It appears under its name
    when complete.

    Args:
        folder (`str` or `Path`): where to; absent, empty, or holding a set of the same parameters, which is then kept.
        num_identities, images_per_identity (`int`): of the training set, at least 1 each.
        dev_identities (`int`): people of the development set, 8 images each; at least 12.
        pairs (`int`): development pairs, a multiple of 20 and at most 12 a development identity.
        size (`int`): side of the pictures in pixels, 24 to 512.
        seed (`int`): other seeds are other people. The development people do not depend on `num_identities`.
        workers (`int`): processes to render with; 0 renders in this one.
        overwrite (`bool`): replace a synthetic set of other parameters, once the new one is complete.
    Returns:
        `Path`: the folder.
    Raises:
        ValueError: an argument out of range.
        FileExistsError: the folder holds something else.
    """
    folder = Path(folder)
    parameters = {
        "renderer": RENDERER_VERSION, "num_identities": num_identities, "images_per_identity": images_per_identity,
        "dev_identities": dev_identities, "pairs": pairs, "size": size, "seed": seed,
    }  # fmt: skip
    if not (1 <= num_identities < 10**6 and images_per_identity >= 1):
        raise ValueError("num_identities must be 1 to 999,999 and images_per_identity at least 1")
    if not 12 <= dev_identities < 10**6:
        raise ValueError(f"dev_identities must be 12 to 999,999, got {dev_identities}")
    if pairs < 2 * FOLDS or pairs % (2 * FOLDS) or pairs > 12 * dev_identities:
        raise ValueError(f"pairs must be a multiple of 20, at most {12 * dev_identities} (12 an identity), got {pairs}")
    if seed < 0 or not 24 <= size <= 512:
        raise ValueError(f"seed must not be negative and size must be 24 to 512, got {seed} and {size}")
    if _holds(folder, parameters, overwrite):
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)  # of an earlier process of that number, killed
    building.mkdir()
    try:
        _write_set(building, parameters, workers)
        try:
            if overwrite and (folder / PARAMETERS_FILE).is_file():
                shutil.rmtree(folder)
            elif folder.is_dir():
                folder.rmdir()  # an empty one stands in the way of the new name on some systems
            building.rename(folder)
        except OSError:
            if not _holds(folder, parameters):  # unless another process was faster with the same set
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _holds(folder: Path, parameters: dict[str, int], overwrite: bool = False) -> bool:
    """Whether the folder holds the set of these parameters.

    Raises:
        FileExistsError: it holds anything else (with `overwrite`: anything but a synthetic set).
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    record = folder / PARAMETERS_FILE
    if not record.is_file():
        raise FileExistsError(f"{folder} holds something that is no synthetic set: choose another folder")
    found = json.loads(record.read_text(encoding="utf-8"))
    if found != parameters and not overwrite:
        other = ", ".join(
            f"{name}={found.get(name)} instead of {value}"
            for name, value in parameters.items()
            if found.get(name) != value
        )
        raise FileExistsError(f"{folder} holds another synthetic set ({other}): remove it or choose another folder")
    return found == parameters


def _write_set(folder: Path, parameters: dict[str, int], workers: int) -> None:
    size, seed = parameters["size"], parameters["seed"]
    first_seed = 2 * 10**6 * seed  # even seeds are training identities, odd ones development identities
    parts = {
        "train": (
            "id",
            [first_seed + 2 * i for i in range(parameters["num_identities"])],
            parameters["images_per_identity"],
        ),
        "dev": ("dev", [first_seed + 2 * i + 1 for i in range(parameters["dev_identities"])], 8),
    }
    with ExitStack() as stack:
        run: Callable[..., Iterable[list[Nuisance]]] = map
        if workers > 0:
            context = multiprocessing.get_context("spawn")
            run = partial(stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map, chunksize=4)
        for part, (prefix, seeds, count) in parts.items():
            (folder / part).mkdir()
            names = [f"{prefix}_{i:04d}" for i in range(len(seeds))]
            tasks = [(folder / part / name, s, count, size) for name, s in zip(names, seeds, strict=True)]
            rows = [
                (f"{name}/{i:03d}.png", name, n.domain, f"{n.yaw:.2f}", f"{n.age:.1f}", f"{n.light_strength:.3f}")
                for name, drawn in zip(names, run(_write_identity, tasks), strict=True)
                for i, n in enumerate(drawn)
            ]
            _write_csv(folder / part / "metadata.csv", "file,identity,domain,yaw,age,illumination", rows)
    _, seeds, count = parts["dev"]
    domains = [IMAGE_DOMAINS[i % len(IMAGE_DOMAINS)] for i in range(count)]
    pairs = (
        (fold, *(f"dev_{identity:04d}/{image:03d}.png" for identity, image in (a, b)), int(same), domain)
        for fold, a, b, same, domain in _draw_pairs(seed, seeds, domains, parameters["pairs"])
    )
    _write_csv(folder / "dev_pairs.csv", "fold,image_a,image_b,same,domain", pairs)
    (folder / PARAMETERS_FILE).write_text(json.dumps(parameters, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `write_synthetic`; `--contact_sheet FILE` also draws 12 of the people."""
    parser = argparse.ArgumentParser(description="Render a set of synthetic faces.")
    parser.add_argument("folder", type=Path, help="where to write the set")
    defaults = {"num_identities": 200, "images_per_identity": 8, "dev_identities": 60, "pairs": 600, "size": 112}
    for name, value in (defaults | {"seed": 0, "workers": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--contact_sheet", type=Path, help="picture file: 12 people, 8 images each, to look at")
    options = vars(parser.parse_args(arguments))
    sheet = options.pop("contact_sheet")
    folder = write_synthetic(**options)
    print(f"{folder}: {options['num_identities']} training and {options['dev_identities']} development identities")
    if sheet:
        first = 2 * 10**6 * options["seed"]
        contact_sheet(range(first, first + 24, 2), size=options["size"]).save(sheet)


if __name__ == "__main__":
    main()
