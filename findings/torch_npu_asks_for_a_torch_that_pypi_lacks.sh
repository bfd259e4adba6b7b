#!/usr/bin/env bash
# torch_npu 2.10.0.post7 for x86-64 cannot be installed from PyPI alone; for aarch64 it can.
#
# Versions: torch-npu 2.10.0.post7, Python 3.11, pip 24.0.
# Behaviour: its wheel for x86-64 requires "torch ==2.10.0+cpu", a local version, which only
#   PyTorch's own index has; PyPI's torch 2.10.0 does not satisfy it, since a requirement that names
#   a local version matches that one alone (PEP 440). The wheel for aarch64 requires plain "2.10.0".
#   Newer ones ask alike on both: 2.14.0 for "2.14.0.*", which either build satisfies.
# Output seen:
#   x86_64 2.10.0.post7: torch ==2.10.0+cpu
#   aarch64 2.10.0.post7: torch ==2.10.0
#   x86_64 2.14.0: torch==2.14.0.*
#   aarch64 2.14.0: torch==2.14.0.*
#   pip: no torch ==2.10.0+cpu on PyPI
# For users: install PyTorch's CPU build from its own index first (docs/ascend.md).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet pip==24.0

asks() { # processor, version: what the wheel requires of torch
    "${pip[@]}" download --quiet --no-deps --only-binary :all: --python-version 3.11 \
        --platform "manylinux_2_28_$1" --dest "$folder/$1" "torch-npu==$2" >&2
    "$folder/env/bin/python" - "$folder/$1"/torch_npu-"$2"-*.whl <<'PYTHON'
import email, sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
(name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
asked = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
print(*(a for a in asked if a.startswith("torch")))
PYTHON
}

found=$(
    for version in 2.10.0.post7 2.14.0; do
        for processor in x86_64 aarch64; do
            echo "$processor $version: $(asks "$processor" "$version")"
        done
    done
    if "${pip[@]}" download --quiet --no-deps --dest "$folder/torch" 'torch==2.10.0+cpu' \
        2>"$folder/error"; then
        echo "pip: found it"
    else
        grep -q 'No matching distribution found for torch==2.10.0+cpu' "$folder/error"
        echo "pip: no torch ==2.10.0+cpu on PyPI"
    fi
)
echo "$found"
diff <(echo "$found" | sort) <(sort <<'SEEN'
x86_64 2.10.0.post7: torch ==2.10.0+cpu
aarch64 2.10.0.post7: torch ==2.10.0
x86_64 2.14.0: torch==2.14.0.*
aarch64 2.14.0: torch==2.14.0.*
pip: no torch ==2.10.0+cpu on PyPI
SEEN
) || { echo "this has changed"; exit 1; }
