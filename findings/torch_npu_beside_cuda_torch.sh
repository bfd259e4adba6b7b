#!/usr/bin/env bash
# torch_npu beside PyPI's own wheel of torch for x86-64, which is a CUDA build: the import ends the
# process.
#
# torch's libc10_cuda.so and torch_npu's libtorch_npu.so both register their allocator's settings in
# one registry of c10, while they are loaded. Two settings have the same names, and the registry
# throws when it is given a name again. Nothing can catch what is thrown while a library is loaded,
# so the process is aborted: no Python exception, exit code 134.
#
# Seen on 2026-11-27 with Python 3.11, of `import torch_npu` where a CANN is found, for torch and
# torch_npu 2.10.0 and 2.10.0.post7, 2.12.0 and 2.12.0.post3, 2.14.0 and 2.14.0:
#
#     terminate called after throwing an instance of 'c10::ValueError'
#       what():  Duplicated key 'pinned_reserve_segment_size_mb' found in device-specific
#       configuration parser hook registration
#     Exception raised from registerDeviceConfigParserHook at .../c10/core/AllocatorConfig.h
#     Aborted (exit code 134)
#
# torch_npu 2.10.0.post4 registers nothing, and loads. So does any of them beside the CPU build:
#     pip install torch==2.14.0 --index-url https://download.pytorch.org/whl/cpu
#
# This script aborts nothing: it downloads the two wheels and shows the cause in what they hold,
# without loading or installing either. It ends with 0 as long as the cause is there, with 1 when
# it has changed, with 2 when the wheels cannot be had. About 600 MB, in a temporary folder.
#
#     findings/torch_npu_beside_cuda_torch.sh [TORCH [TORCH_NPU]]      # default: 2.14.0 2.14.0
set -euo pipefail

torch=${1:-2.14.0} torch_npu=${2:-2.14.0}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv" || exit 2
# The platform is named, so that it shows the same wheels on every machine.
"$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$work" \
    --only-binary :all: --implementation cp --python-version 3.11 --abi cp311 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    "torch==$torch" "torch-npu==$torch_npu" || exit 2

"$work/venv/bin/python" - "$work" <<'PYTHON'
"""The settings that both wheels register, and what becomes of the second to do so."""
import re
import sys
import zipfile
from pathlib import Path


def wheel(pattern):
    (path,) = Path(sys.argv[1]).glob(pattern)
    print("wheel:", path.name)
    return zipfile.ZipFile(path)


def text(wheel, path):
    return wheel.read(path).decode()


def keys(header):
    """What `getKeys` of a header returns, with C's adjacent literals put together; may be none."""
    body = re.search(r"unordered_set<std::string> keys\{(.*?)\};", header, re.DOTALL)
    items = re.sub(r"//.*", "", body[1] if body else "").split(",")
    return {"".join(re.findall(r'"(.*?)"', item)) for item in items}


failed = False


def show(what, holds):
    global failed
    failed |= not holds
    print(f"[{'yes' if holds else 'NO'}] {what}")


torch, npu = wheel("torch-*.whl"), wheel("torch_npu-*.whl")
version = text(torch, "torch/version.py")
cuda = re.search(r"^cuda\b.*?=\s*'(.*?)'", version, re.MULTILINE)
names = torch.namelist()
show(f"PyPI's torch is a CUDA build: {cuda and cuda[1]}", "torch/lib/libc10_cuda.so" in names)
if failed:
    sys.exit("There is no CUDA build to look into: this has changed.")

ours = keys(text(torch, "torch/include/c10/cuda/CUDAAllocatorConfig.h"))
theirs = keys(text(npu, "torch_npu/include/torch_npu/csrc/core/npu/NPUAllocatorConfig.h"))
both = sorted(ours & theirs)
show(f"both headers list these settings: {', '.join(both)}", bool(both))

registry = text(torch, "torch/include/c10/core/AllocatorConfig.h")
found = re.search(r" *static void registerDeviceConfigParserHook\(.*?\n  }\n", registry, re.DOTALL)
throws = found[0] if found else ""
show("c10's registry throws at a name that it knows:", "insert(key).second" in throws)
print(throws)

message = b"found in device-specific configuration parser hook registration"
symbol = b"_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeys"
libraries = {
    "libc10_cuda.so": torch.read("torch/lib/libc10_cuda.so"),
    "libtorch_npu.so": npu.read("torch_npu/lib/libtorch_npu.so"),
}
for name, library in libraries.items():
    show(f"{name} registers its settings there, at c10's {symbol.decode()}",
         message in library and symbol in library)
    for key in both:
        show(f"{name} holds {key}", key.encode() in library)
print("Importing torch_npu beside this torch ended the process when it was tried; see the head.")
if failed:
    sys.exit("This has changed.")
PYTHON
