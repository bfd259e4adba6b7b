#!/usr/bin/env bash
# npugraph_ex cannot compile a graph with npu_weight_quant_batchmatmul (int8 or int4 weights).
#
# Version: the npugraph_ex in torch-npu 2.14.0; 2.10.0.post7, 2.12.0.post3 and 2.13.0 hold the same.
# Behaviour: for that op its compiler switches an option off, `config.experimental_config.
#   enable_view_optimize`. That is an option of torchair's configuration, from which npugraph_ex comes;
#   its own has no `experimental_config`. torch.compile(..., backend="npugraph_ex") of any function
#   that calls the op ends in an AttributeError (seen over a simulated CANN with 2.10.0.post4, 2.13.0
#   and 2.14.0). torchair compiles the same function.
# Output seen:
#   the compiler sets: self.config.experimental_config.enable_view_optimize = False
#   npugraph_ex's configuration has experimental_config: False
#   torchair's configuration has experimental_config: True
# For users: ascend_sp hands such a graph to the next target with a warning.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$folder" \
    --only-binary :all: --python-version 3.11 --platform manylinux_2_28_x86_64 torch-npu==2.14.0
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import ast
import sys
import zipfile
from pathlib import Path

(path,) = Path(sys.argv[1]).glob("torch_npu-*.whl")
wheel = zipfile.ZipFile(path)


def parsed(name):
    return ast.parse(wheel.read(f"torch_npu/dynamo/{name}"))


def sets(tree):
    """What the module assigns to attributes of attributes of self."""
    return {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Assign)}


def has(package):
    """Whether the configuration's class gives itself the attribute."""
    tree = parsed(f"{package}/configs/compiler_config.py")
    (kind,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CompilerConfig")
    found = [ast.unparse(t) for n in ast.walk(kind) if isinstance(n, ast.Assign) for t in n.targets]
    return "self.experimental_config" in found


def option_base(package):
    """Whether the classes that it inherits from, or __getattr__, could bring it."""
    files = [n for n in wheel.namelist() if n.startswith(f"torch_npu/dynamo/{package}/configs/")]
    return any(b"__getattr__" in wheel.read(n) for n in files if n.endswith(".py"))


line = "self.config.experimental_config.enable_view_optimize = False"
compiler = "npugraph_ex/npu_fx_compiler.py"
named = b"npu.npu_weight_quant_batchmatmul.default" in wheel.read(f"torch_npu/dynamo/{compiler}")
there = named and line in sets(parsed(compiler))
print("the compiler sets:", line if there else None)
own, theirs = has("npugraph_ex"), has("torchair")
print("npugraph_ex's configuration has experimental_config:", own)
print("torchair's configuration has experimental_config:", theirs)
if not there or own or not theirs or option_base("npugraph_ex"):
    sys.exit("this has changed")
PYTHON
