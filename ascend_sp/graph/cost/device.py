"""What a device reaches, in numbers with sources: the table, and files that `calibrate` wrote.

Rates are what is *reached* on large operands, not peaks. Everything that is computed from them is
an estimate.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ascend_sp.runtime.errors import ConfigError
from ascend_sp.runtime.npu import DEVICE


class LinkCost(NamedTuple):
    """What a collective takes, in seconds."""

    seconds: float
    """From its start to its end."""
    work: float
    """Of the device's own time, in which it computes nothing else."""


@dataclass(frozen=True)
class DeviceModel:
    """Rates of one device and of the links between ranks."""

    name: str
    matmul: Mapping[str, float]
    """Flop/s of large matrix products, by dtype (``"bfloat16"``)."""
    attention: Mapping[str, float]
    """Flop/s of fused attention, by dtype."""
    memory: float
    """Bytes/s, read and written together, of kernels that only move data."""
    transcendental: float
    """Elements/s of pointwise kernels with an exp, a tanh, an erf... in them."""
    launch: float
    """Seconds that a kernel takes at least."""
    link_latency: float
    """Seconds that a collective takes at least."""
    link_bandwidth: float
    """Bytes/s in one direction: between two ranks, or of one rank's link if `shared_link`."""
    shared_link: bool
    """Whether a rank has one link for all peers (a NIC, loopback), not one for each (HCCS)."""
    link_launch: float = 0.0
    """Seconds of the device's own time that a collective takes at least."""
    link_work: float = 0.0
    """Seconds of the device's own time a byte sent; 0 where the link moves it by itself."""
    sources: tuple[str, ...] = ()
    """Where the numbers are from."""

    def product_rate(self, dtype: torch.dtype) -> float:
        """Flop/s of a matrix product; a dtype that is not listed counts as the slowest listed."""
        return _rate(self.matmul, dtype)

    def attention_rate(self, dtype: torch.dtype) -> float:
        """Flop/s of fused attention; a dtype that is not listed counts as the slowest listed."""
        return _rate(self.attention, dtype)

    def all_to_all(self, bytes_total: float, ranks: int) -> LinkCost:
        """Cost of an all-to-all of which each rank puts in `bytes_total`, a block per rank."""
        return self._exchange(bytes_total / ranks, ranks)

    def all_gather(self, bytes_total: float, ranks: int) -> LinkCost:
        """Cost of an all-gather of which each rank puts in `bytes_total`."""
        return self._exchange(bytes_total, ranks)

    def all_reduce(self, bytes_total: float, ranks: int) -> LinkCost:
        """Cost of the sum of `bytes_total` over all ranks: a reduce-scatter, an all-gather."""
        return self._exchange(2 * bytes_total / ranks, ranks)

    def _exchange(self, per_peer: float, ranks: int) -> LinkCost:
        """Cost of sending `per_peer` bytes from every rank to every other one."""
        if ranks == 1:
            return LinkCost(0.0, 0.0)
        return self.exchange([per_peer] * (ranks - 1))

    def exchange(self, blocks: Sequence[float]) -> LinkCost:
        """Cost of sending a block of so many bytes to each of some ranks, the same on all ranks."""
        sent = sum(blocks)
        busiest = sent if self.shared_link else max(blocks)
        return LinkCost(
            self.link_latency + busiest / self.link_bandwidth,
            self.link_launch + sent * self.link_work,
        )

    def to_json(self) -> str:
        """The numbers as text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the text") -> DeviceModel:
        """What `to_json` wrote.

        Args:
            text: a JSON object with the fields of this class.
            where: what errors call the text, e.g. its file.

        Raises:
            ConfigError: it is no such object; names the field, its value and what is allowed.
        """
        try:
            given = json.loads(text)
        except ValueError as e:
            raise ConfigError(f"{where} is not JSON ({e}). {_REMEDY}") from None
        if not isinstance(given, dict):
            raise ConfigError(f"{where} holds {given!r}, not a JSON object. {_REMEDY}")
        names = {f.name for f in fields(cls)}
        for what, wrong in (
            ("lacks", names - OPTIONAL - set(given)),
            ("has unknown", set(given) - names),
        ):
            if wrong:
                raise ConfigError(
                    f"{where} {what} {', '.join(sorted(wrong))}; its keys are "
                    f"{', '.join(sorted(names))}. {_REMEDY}"
                )
        return cls(**{key: _checked(key, value, where) for key, value in given.items()})


OPTIONAL = frozenset({"link_launch", "link_work", "sources"})
_REMEDY = "Write it with `python -m ascend_sp calibrate --out FILE`."


def _rate(rates: Mapping[str, float], dtype: torch.dtype) -> float:
    return rates.get(str(dtype).removeprefix("torch."), min(rates.values()))


def _checked(key: str, value: Any, where: str) -> Any:
    """`value` as the field `key` has it, or a ConfigError."""
    if key == "name":
        ok, allowed = isinstance(value, str) and bool(value), "a name"
    elif key == "sources":
        ok = isinstance(value, list) and all(isinstance(v, str) for v in value)
        allowed, value = "a list of texts", tuple(value) if ok else value
    elif key == "shared_link":
        ok, allowed = isinstance(value, bool), "true or false"
    elif key in ("matmul", "attention"):
        ok = isinstance(value, dict) and bool(value)
        ok = ok and all(_is_dtype(k) and _is_positive(v) for k, v in value.items())
        allowed = 'an object like {"bfloat16": flop/s, ...}, each a dtype of torch and a number > 0'
    elif key in OPTIONAL:
        ok, allowed = _is_positive(value, or_zero=True), "a number >= 0"
    else:
        ok, allowed = _is_positive(value), "a number > 0"
    if not ok:
        raise ConfigError(f"{where}: {key} is {value!r}; it must be {allowed}. {_REMEDY}")
    return value


def _is_positive(value: Any, or_zero: bool = False) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and (value > 0 or (or_zero and value == 0))


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


# Ascend/msmodeling, tensor_cast/device.py at 1e5a50b, gives peaks, and factors that it says need to
# be calibrated: 0.7 of compute, 0.6 of memory, 0.7 of a link, 2 us a vector kernel (5 us a matrix
# product, which is long anyway), 10 us a collective and 0.5 us an HCCS link. HBM has 1.6 TB/s, the
# seven HCCS links of a card 196 GB/s together in one direction, so 28 GB/s between two cards.
_COMPUTE, _MEMORY, _LINK = 0.7, 0.6, 0.7
# pto-isa's demos/torch_jit/flash_atten/README.md measures a fused attention on a 910B2 at 170-190
# Tflop/s, scaled to all cores, for 8192 keys: half of the 353.9 that msmodeling gives for its peak.
_ATTENTION = 0.5
# How many vector instructions an exp or a tanh takes is not known to us.
_VECTOR_OPS = 16


def _ascend(name: str, what: str, peaks: Mapping[str, float], vector: float) -> DeviceModel:
    """A card of an Atlas 800I A2: eight in a full mesh. Peaks in flop/s, `vector` of float32."""
    return DeviceModel(
        name=name,
        matmul={dtype: _COMPUTE * peak for dtype, peak in peaks.items()},
        attention={dtype: _ATTENTION * peak for dtype, peak in peaks.items()},
        memory=_MEMORY * 1.6e12,
        transcendental=_COMPUTE * vector / _VECTOR_OPS,
        launch=2e-6,
        link_latency=10.5e-6,
        link_bandwidth=_LINK * 28e9,
        shared_link=False,
        sources=(
            what,
            "Ascend/msmodeling tensor_cast/device.py 1e5a50b: peaks, HBM, HCCS, and its factors "
            "0.7 compute, 0.6 memory, 0.7 link; 2 us a kernel, 10.5 us a collective",
            "pto-isa demos/torch_jit/flash_atten/README.md: attention at half of a 910B2's peak",
            f"assumed: {_VECTOR_OPS} vector operations for an exp or a tanh",
        ),
    )


DEVICES: dict[str, DeviceModel] = {
    d.name: d
    for d in (
        _ascend(
            "910B3",
            "taken to be msmodeling's ATLAS_800_A2_313T_64G, which has the 20 cores of a 910B3",
            {"float16": 313e12, "bfloat16": 294.9e12, "float32": 83e12},
            vector=9e12,
        ),
        _ascend(
            "910B4",
            "msmodeling's ATLAS_800_A2_280T_64G; cards with 32 GB have half its memory rate",
            {"float16": 280e12, "bfloat16": 245.8e12, "float32": 75e12},
            vector=8e12,
        ),
        DeviceModel(
            name="cpu",
            matmul={"float32": 92e9, "bfloat16": 198e9},
            attention={"float32": 88e9, "bfloat16": 76e9},
            memory=17e9,
            transcendental=0.58e9,
            launch=1.2e-6,
            link_latency=220e-6,
            link_bandwidth=2.3e9,
            shared_link=True,
            link_launch=190e-6,
            link_work=0.46e-9,
            sources=(
                "measured by `ascend_sp calibrate`: two ranks, one core each, of an AMD EPYC "
                "(Zen 4) with AVX-512, gloo on loopback",
            ),
        ),
    )
}
"""By name. Other devices: a file."""


def find(name_or_path: str, device: str, soc: str = "") -> DeviceModel:
    """The model of a device.

    Args:
        name_or_path: ``"auto"``, a name in `DEVICES`, or a file that `calibrate` wrote.
        device: the type of the device that the program runs on (``"npu"``, ``"cpu"``...), for
            ``"auto"``. One that is neither of these two counts as a 910B4: an accelerator with a
            link to each peer. Better calibrate it.
        soc: the name of the chip, e.g. ``"Ascend910B3"``, for ``"auto"``. One that the table does
            not have counts as a 910B4, the most common card of an Atlas 800I A2.

    Raises:
        ConfigError: no such name or file, or a file that does not hold a device.
    """
    if name_or_path == "auto":
        chip = soc.removeprefix("Ascend")
        known = device == DEVICE and chip in DEVICES and chip != "cpu"
        return DEVICES["cpu" if device == "cpu" else chip if known else "910B4"]
    if name_or_path in DEVICES:
        return DEVICES[name_or_path]
    try:
        text = Path(name_or_path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        looked = "file" if os.sep in name_or_path or name_or_path.endswith(".json") else "device"
        raise ConfigError(
            f"there is no {looked} {name_or_path!r} ({e}). It must be auto, "
            f"{', '.join(DEVICES)}, or a file. {_REMEDY}"
        ) from None
    return DeviceModel.from_json(text, where=f"device file {name_or_path!r}")
