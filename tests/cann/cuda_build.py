"""For tests only: let a CUDA build of torch live beside torch_npu.

    python tests/cann/cuda_build.py SITE_PACKAGES

SITE_PACKAGES is the folder that holds ``torch``, of an environment made for tests. PyPI's wheels of
torch for x86-64 are CUDA builds. Their ``libc10_cuda.so`` and torch_npu's ``libtorch_npu.so`` both
register settings of the allocator while they are loaded, two of them under the same names; the
second to register one throws where nothing can catch it, and the process ends ("Duplicated key ...
in device-specific configuration parser hook registration"). Users take the CPU build instead. Where
only CUDA wheels can be had, this gives ``libc10_cuda.so`` other names for the two, which nobody
asks for on a machine without a GPU. A CPU build has no such file, and stays as it is.

Tested with torch 2.10.0, 2.12.0 and 2.14.0, each beside its torch_npu; the wheels of 2.11.0,
2.12.1, 2.14.1 and 2.15.0 hold the names in the same way.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

LIBRARY = Path("torch", "lib", "libc10_cuda.so")

# What both register. CUDA's are renamed: their last letter becomes a capital.
KEYS = (b"pinned_reserve_segment_size_mb", b"per_process_memory_fraction")


class PatchError(SystemExit):
    """The library is not built like the ones that are known; nothing was changed."""


def renamed(key: bytes) -> bytes:
    return key[:-1] + key[-1:].upper()


def as_compiled(key: bytes) -> bytes:
    """What the library holds of a key of 17 to 32 letters that it makes a ``std::string`` of.

    Two constants of 16 bytes, which overlap where they are put together. The text in one piece
    occurs too, but is only what settings and messages are compared with or made of.
    """
    return key[:16] + key[-16:]


def patched(library: bytes) -> bytes:
    """`library` with the keys renamed; equal to it if they already were."""
    for key in KEYS:
        old, new = as_compiled(key), as_compiled(renamed(key))
        if library.count(old) + library.count(new) != 1:
            raise PatchError(
                f"cuda_build: {LIBRARY.name} does not hold {key.decode()!r} where it is expected: "
                "take the CPU build of torch, or find how this version registers it"
            )
        library = library.replace(old, new)
    return library


def patch(site: Path) -> bool:
    """Patch the torch in `site`; False if there is nothing to do.

    The file is replaced, never written to: installers link it into other environments.
    """
    path = site / LIBRARY
    if not (site / "torch").is_dir():
        raise PatchError(f"cuda_build: {site} holds no torch")
    if not path.exists():
        return False
    before = path.read_bytes()
    after = patched(before)
    if after == before:
        return False
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_bytes(after)
    shutil.copymode(path, new)
    os.replace(new, path)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("site", type=Path, metavar="SITE_PACKAGES")
    site = parser.parse_args().site
    print(f"cuda_build: {site / LIBRARY} {'patched' if patch(site) else 'needs nothing'}")


if __name__ == "__main__":
    main()
