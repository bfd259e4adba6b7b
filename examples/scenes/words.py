"""Scenes by the sea, and what can be said of them: what the demo's model is trained on.

A scene is a few words (what stands there, which time of day, what is in the sky) and small random
shifts. Its caption says the words in one of many ways. Numbers come from Python's own `random`,
whose stream is the same in every version, so a seed is a scene.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

TIMES = ("day", "night", "sunset")
SUBJECTS = ("lighthouse", "ship", "lighthouse and ship", "sea")
SKIES = {"day": ("", "sun"), "night": ("", "moon"), "sunset": ("", "sun")}


@dataclass(frozen=True)
class Scene:
    """What is drawn, and where; coordinates run from 0 to 1, right and down."""

    time: str
    subject: str
    sky: str
    """`sun`, `moon` or nothing."""
    left: bool
    """The lighthouse stands at the left; the ship and what is in the sky lie opposite."""
    shifts: tuple[float, ...]
    """Eight numbers from -1 to 1: where things stand, and how large they are."""


def scene(rng: random.Random) -> Scene:
    """Any scene."""
    time = rng.choice(TIMES)
    sky = rng.choice(SKIES[time] + SKIES[time][1:])
    shifts = tuple(rng.uniform(-1, 1) for _ in range(8))
    subject = rng.choice(SUBJECTS)
    return Scene(time, subject, sky, "lighthouse" in subject and rng.random() < 0.3, shifts)


_SUBJECT = {
    "lighthouse": (
        "a lighthouse",
        "a lighthouse on a cliff",
        "the lighthouse",
        "an old lighthouse",
    ),
    "ship": ("a ship", "a ship at sea", "a sailing ship", "the ship", "a ship on the water"),
    "lighthouse and ship": (
        "a lighthouse and a ship",
        "a ship and a lighthouse",
        "a lighthouse on a cliff and a ship",
        "a ship passing a lighthouse",
        "a ship near a lighthouse",
    ),
    "sea": ("the sea", "the open sea", "an empty sea", "the ocean"),
}
_TIME = {
    "day": ("by day", "in daylight", "during the day", "at noon"),
    "night": ("at night", "by night", "in the night", "at midnight"),
    "sunset": ("at sunset", "at dusk", "in the evening"),
}
_SKY = {
    "sun": ("under the sun", "the sun", "a bright sun", "with the sun", "and the sun"),
    "moon": ("under the moon", "the moon", "a full moon", "with a full moon", "and the moon"),
}
_STYLE = ("oil painting", "a painting", "a drawing", "flat colours", "a poster", "watercolour")


def caption(what: Scene, rng: random.Random) -> str:
    """One of the ways to say what a scene shows.

    By day goes without saying, and the moon means night; at the right goes without saying, too.
    """
    subject = rng.choice(_SUBJECT[what.subject])
    if what.left:
        subject = subject.replace(" on a cliff", "").replace("house", "house on the left")
    implied = {"sun": "day", "moon": "night"}.get(what.sky, "day") == what.time
    time = "" if implied and rng.random() < 0.3 else rng.choice(_TIME[what.time])
    sky = rng.choice(_SKY[what.sky]) if what.sky else ""
    first = time and rng.random() < 0.25
    words = f"{time}, {subject}" if first else f"{subject} {time}".strip()
    if sky:
        words += (" " if sky.startswith(("under", "with", "and")) else ", ") + sky
    if rng.random() < 0.3:
        words += ", " + rng.choice(_STYLE)
    return words
