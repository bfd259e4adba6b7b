"""Scenes by the sea, drawn by a program.

    cd examples && python -m scenes.draw ../out/scenes.png

draws a sheet of them.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .words import Scene, caption, scene

SIDE = 192
"""Pixels of a picture's side."""

Colour = tuple[float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class _Palette:
    zenith: Colour
    horizon: Colour
    near: Colour
    far: Colour
    land: Colour
    rock: Colour
    light: Colour
    """What white things look like; others are multiplied by it."""


_PALETTES = {
    "day": _Palette(
        (0.22, 0.52, 0.88), (0.78, 0.90, 0.97), (0.05, 0.28, 0.50), (0.25, 0.56, 0.74),
        (0.40, 0.62, 0.25), (0.50, 0.44, 0.38), (1.0, 1.0, 1.0),
    ),
    "night": _Palette(
        (0.02, 0.03, 0.12), (0.12, 0.17, 0.38), (0.02, 0.04, 0.12), (0.07, 0.12, 0.27),
        (0.09, 0.15, 0.14), (0.13, 0.14, 0.20), (0.56, 0.60, 0.76),
    ),
    "sunset": _Palette(
        (0.30, 0.22, 0.50), (0.99, 0.62, 0.30), (0.20, 0.13, 0.32), (0.80, 0.46, 0.40),
        (0.20, 0.17, 0.16), (0.24, 0.17, 0.20), (0.95, 0.70, 0.58),
    ),
}  # fmt: skip

HORIZON = 0.62
WHITE, RED, GLOW = (0.97, 0.96, 0.93), (0.80, 0.16, 0.14), (1.0, 0.90, 0.50)
# Stars always stand alike: where they stand is nothing that a caption could say.
_STARS = tuple(
    (r.random(), r.random() * 0.5, r.uniform(0.5, 1)) for r in [random.Random(5)] for _ in range(26)
)


class _Canvas:
    """A picture that is painted on, shape over shape, with smooth edges."""

    def __init__(self, side: int) -> None:
        self.side = side
        centre = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.x, self.y = centre[None, :], centre[:, None]
        self.pixels = np.zeros((side, side, 3), np.float32)

    def paint(self, cover: np.ndarray, colour: Colour | np.ndarray) -> None:
        """Lay a colour over the whole picture, where and as much as `cover` says."""
        self.pixels += (np.asarray(colour, np.float32) - self.pixels) * cover[..., None]

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """From the distance to a shape's edge, negative inside, the share of a pixel inside."""
        return (0.5 - distance * self.side).clip(0, 1)

    def within(self, left: float, top: float, right: float, bottom: float) -> _Canvas:
        """The part of the picture around a shape, to paint on."""
        part = _Canvas.__new__(_Canvas)
        part.side = self.side
        x0, y0 = (max(0, int(v * self.side) - 2) for v in (left, top))
        x1, y1 = (max(0, int(v * self.side) + 3) for v in (right, bottom))
        part.x, part.y = self.x[:, x0:x1], self.y[y0:y1]
        part.pixels = self.pixels[y0:y1, x0:x1]
        return part

    def polygon(self, corners: Sequence[Point], colour: Colour) -> None:
        """A convex polygon, corners clockwise as seen."""
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        part = self.within(min(xs), min(ys), max(xs), max(ys))
        edges = []
        for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
            dx, dy = bx - ax, by - ay
            edges.append(((part.x - ax) * dy - (part.y - ay) * dx) / math.hypot(dx, dy))
        part.paint(self.cover(np.maximum.reduce(np.broadcast_arrays(*edges))), colour)

    def box(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """A rectangle that stands on y, with its middle at x."""
        w = width / 2
        self.polygon([(x - w, y - height), (x + w, y - height), (x + w, y), (x - w, y)], colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour, halo: float = 0) -> None:
        reach = radius * max(1, 2.5 * halo)
        part = self.within(x - reach, y - reach, x + reach, y + reach)
        far = np.hypot(part.x - x, part.y - y)
        if halo:
            part.paint(0.55 * np.exp(-((far / radius / halo) ** 2)), colour)
        part.paint(self.cover(far - radius), colour)


def _times(a: Colour, b: Colour) -> Colour:
    return (a[0] * b[0], a[1] * b[1], a[2] * b[2])


def _mixed(a: Colour, b: Colour, share: np.ndarray) -> np.ndarray:
    share = share[..., None]
    return np.asarray(a, np.float32) * (1 - share) + np.asarray(b, np.float32) * share


def draw(what: Scene, side: int = SIDE) -> np.ndarray:
    """The picture of a scene: [side, side, 3], uint8."""
    to = _PALETTES[what.time]
    on = _Canvas(side)
    on.pixels[:] = _mixed(to.zenith, to.horizon, (on.y / HORIZON).clip(0, 1) ** 1.3)
    x, y, *_ = what.shifts
    light_x, light_y = 0.26 + 0.06 * x, 0.20 + 0.04 * y
    if what.time == "sunset":
        light_y += 0.30
    colour: Colour = (1.0, 0.97, 0.86) if what.sky == "moon" else (1.0, 0.93, 0.45)
    if what.time == "sunset":
        colour = (1.0, 0.86, 0.50)
    if what.time == "night":
        for sx, sy, bright in _STARS:
            part = on.within(sx - 0.02, sy - 0.02, sx + 0.02, sy + 0.02)
            far = (part.x - sx) ** 2 + (part.y - sy) ** 2
            part.paint(bright * np.exp(-far * 150**2), WHITE)
    if what.time == "day":
        for cx, cy, size in ((0.56, 0.14, 1.0), (0.10, 0.40, 0.7), (0.88, 0.30, 0.8)):
            _cloud(on, cx + 0.05 * what.shifts[6], cy, size)
    if what.sky:
        on.disc(light_x, light_y, 0.085, colour, halo=2.2)
        if what.sky == "moon":
            for mx, my, r in ((-0.028, -0.02, 0.022), (0.025, 0.022, 0.028), (0.03, -0.035, 0.014)):
                on.disc(light_x + mx, light_y + my, r, (0.86, 0.83, 0.72))
    _sea(on, to, light_x if what.sky else None, colour)
    if "lighthouse" in what.subject:
        _lighthouse(on, to, what)
    if "ship" in what.subject:
        _ship(on, to, what)
    pixels = on.pixels[:, ::-1] if what.left else on.pixels
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _cloud(on: _Canvas, x: float, y: float, size: float) -> None:
    for dx, dy, r in ((-0.07, 0.0, 0.035), (0.0, -0.02, 0.05), (0.07, 0.0, 0.04)):
        on.disc(x + dx * size, y + dy * size, r * size, (0.98, 0.99, 1.0))
    on.box(x, y + 0.04 * size, 0.16 * size, 0.035 * size, (0.98, 0.99, 1.0))


def _sea(on: _Canvas, to: _Palette, light: float | None, colour: Colour) -> None:
    on.paint(on.cover(HORIZON - on.y), np.asarray(to.far))
    on = on.within(0, HORIZON, 1, 1)
    depth = ((on.y - HORIZON) / (1 - HORIZON)).clip(0, 1)
    on.paint((depth > 0) * np.float32(1), _mixed(to.far, to.near, depth**0.7))
    # Waves: bright lines that lie wider apart the nearer they are.
    waves = (np.sin(34 * depth**0.6 + 0.5 * np.sin(9 * on.x + 20 * depth)) - 0.55).clip(0, 1)
    on.paint(0.35 * waves * (depth > 0), to.far)
    if light is not None:
        width = 0.03 + 0.10 * depth
        path = np.exp(-(((on.x - light) / width) ** 2)) * (0.25 + 0.75 * (waves > 0.05))
        on.paint(0.75 * path * (depth > 0), colour)


def _lighthouse(on: _Canvas, to: _Palette, what: Scene) -> None:
    x, size = 0.72 + 0.04 * what.shifts[2], 1 + 0.08 * what.shifts[3]
    foot = 0.60
    # The cliff: a rock that falls off to the left, grass on its top.
    on.polygon([(0.56, 0.60), (1.1, 0.56), (1.1, 0.86), (0.47, 0.80)], to.rock)
    on.polygon(
        [(0.50, 0.72), (0.62, 0.70), (1.1, 0.88), (0.44, 0.83)], _times(to.rock, (0.75,) * 3)
    )
    on.polygon([(0.55, 0.60), (0.66, 0.575), (1.1, 0.555), (1.1, 0.615), (0.57, 0.635)], to.land)
    lit = what.time != "day"
    top, low, high = foot - 0.36 * size, 0.062 * size, 0.040 * size
    lamp = (x, top - 0.032 * size)
    if lit:
        strength = 0.55 if what.time == "night" else 0.25
        for toward, spread in ((-1.0, 0.10), (1.0, 0.05)):
            far = (on.x - lamp[0]) * toward
            off = np.abs(on.y - lamp[1] - 0.02 * far) - 0.012 - spread * far.clip(0)
            beam = (0.5 - off / (0.006 + 0.05 * far.clip(0))).clip(0, 1) * (far > 0)
            on.paint(strength * beam * np.exp(-2.2 * far.clip(0)), GLOW)

    def width(at: float) -> float:
        return low + (high - low) * at

    white, red = _times(WHITE, to.light), _times(RED, to.light)
    for i in range(5):
        a, b = i / 5, (i + 1) / 5
        ya, yb = foot - 0.36 * size * a, foot - 0.36 * size * b
        wa, wb = width(a), width(b)
        corners = [(x - wb, yb), (x + wb, yb), (x + wa, ya), (x - wa, ya)]
        on.polygon(corners, red if i % 2 else white)
        # The side away from the light lies in shadow.
        shade = _times(red if i % 2 else white, (0.80, 0.80, 0.86))
        on.polygon([(x + wb * 0.25, yb), (x + wb, yb), (x + wa, ya), (x + wa * 0.25, ya)], shade)
    dark = _times((0.20, 0.20, 0.24), to.light)
    on.box(x, foot, 0.026 * size, 0.05 * size, dark)
    on.box(x, top + 0.004, 0.115 * size, 0.016 * size, dark)
    on.box(x, top - 0.010, 0.058 * size, 0.046 * size, GLOW if lit else (0.75, 0.87, 0.93))
    for post in (-1, 0, 1):
        on.box(x + post * 0.027 * size, top - 0.010, 0.007 * size, 0.046 * size, dark)
    on.polygon(
        [(x, top - 0.105 * size), (x + 0.042 * size, top - 0.055 * size),
         (x - 0.042 * size, top - 0.055 * size)], red,
    )  # fmt: skip
    if lit:
        part = on.within(lamp[0] - 0.15, lamp[1] - 0.15, lamp[0] + 0.15, lamp[1] + 0.15)
        far = (part.x - lamp[0]) ** 2 + (part.y - lamp[1]) ** 2
        part.paint(0.6 * np.exp(-far / (0.05 * size) ** 2), GLOW)


def _ship(on: _Canvas, to: _Palette, what: Scene) -> None:
    x, size = 0.30 + 0.05 * what.shifts[4], 1 + 0.08 * what.shifts[5]
    if what.subject == "ship":
        x, size = x + 0.18, size * 1.25
    water = 0.76
    mast, s = x + 0.005, size
    sail, hull = _times(WHITE, to.light), _times((0.42, 0.22, 0.13), to.light)
    shadow = _times(sail, (0.82, 0.84, 0.90))
    on.box(mast, water - 0.05 * s, 0.010 * s, 0.36 * s, hull)
    on.polygon([(mast + 0.008 * s, water - 0.38 * s), (mast + 0.150 * s, water - 0.085 * s),
                (mast + 0.008 * s, water - 0.085 * s)], shadow)  # fmt: skip
    on.polygon([(mast - 0.010 * s, water - 0.36 * s), (mast - 0.010 * s, water - 0.085 * s),
                (mast - 0.125 * s, water - 0.085 * s)], sail)  # fmt: skip
    on.polygon([(mast, water - 0.415 * s), (mast + 0.06 * s, water - 0.395 * s),
                (mast, water - 0.375 * s)], _times(RED, to.light))  # fmt: skip
    on.polygon([(x - 0.17 * s, water - 0.065 * s), (x + 0.19 * s, water - 0.065 * s),
                (x + 0.13 * s, water), (x - 0.12 * s, water)], hull)  # fmt: skip
    on.polygon([(x - 0.17 * s, water - 0.065 * s), (x + 0.19 * s, water - 0.065 * s),
                (x + 0.176 * s, water - 0.048 * s), (x - 0.156 * s, water - 0.048 * s)],
               _times(RED, to.light))  # fmt: skip
    if what.time != "day":
        for port in (-0.07, 0.0, 0.07):
            on.disc(x + port * s, water - 0.03 * s, 0.011 * s, GLOW)
    on.polygon([(x - 0.15 * s, water - 0.004), (x + 0.16 * s, water - 0.004),
                (x + 0.12 * s, water + 0.012), (x - 0.11 * s, water + 0.012)],
               (to.near[0] * 0.7, to.near[1] * 0.7, to.near[2] * 0.7))  # fmt: skip


def main() -> None:
    """Write a sheet of scenes, and print their captions."""
    from PIL import Image

    rng = random.Random(0)
    across, rows = 6, 4
    sheet = Image.new("RGB", (across * SIDE, rows * SIDE))
    for i in range(across * rows):
        what = scene(rng)
        sheet.paste(Image.fromarray(draw(what)), (i % across * SIDE, i // across * SIDE))
        print(caption(what, rng))
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "out/scenes.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
