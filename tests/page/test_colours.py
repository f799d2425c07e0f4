"""The heatmap's colours are told apart without colour vision, and by those who see few colours."""

import re

import numpy as np
import pytest

from lightning_bnmonitor.page.html import ASSETS
from lightning_bnmonitor.report import heatmap

# Machado, Oliveira and Fernandes 2009, full severity, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def ramps(name):
    """Colours of the light and of the dark mode, as they stand in the module."""
    text = (ASSETS / "theme.js").read_text(encoding="utf-8")
    block = re.search(rf"const {name} = {{\n(.*?)}};", text, re.DOTALL).group(1)
    return {mode: re.findall("#[0-9a-f]{6}", colors) for mode, colors in re.findall(r"(light|dark): \[(.*?)\]", block)}


def lab(colors, vision="normal"):
    """CIE L*a*b* of colours as they are seen."""
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in colors])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISION[vision]).T, 0, 1)
    xyz = seen @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    t = xyz / [0.9505, 1.0, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_the_light_ones_are_those_of_the_picture():
    assert tuple(ramps("STEPS")["light"]) == heatmap._COLORS


@pytest.mark.parametrize(("mode", "sign"), [("light", -1), ("dark", 1)])
def test_steps_differ_in_lightness_alone(mode, sign):
    lightness = lab(ramps("STEPS")[mode])[:, 0]
    assert (sign * np.diff(lightness) > 8).all(), lightness


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("name", ["STEPS", "DIFFERENCES"])
def test_every_two_colours_can_be_told_apart(name, vision, mode):
    seen = lab(ramps(name)[mode], vision)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    assert distance[~np.eye(len(seen), dtype=bool)].min() > 8, distance.round()
