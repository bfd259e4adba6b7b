"""Build the simulated CANN libraries: `python build.py --torch-npu SITE --out DIR`.

SITE is the folder that holds ``torch_npu`` (site-packages, or the target of ``pip install
--target``). Every CANN name that the wheel needs becomes a function: with a body if ``native/``
has one, else a stub that can say that it was called.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE / "native"
MAIN = "libcannsim.so"
STAMP = "stamp.txt"

# The libraries of CANN that the wheel links to or opens. They are empty; each needs MAIN.
SHELLS = (
    "libhccl.so",
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libfmk_parser.so",
    "libascend_protobuf.so",
    "libatb.so",
)

# Looked up with dlsym, and of use only as absent: torch_npu then takes its older path.
ABSENT = {"aclrtEventGetTimestamp"}

# Undefined in the wheel, but not CANN's.
FOREIGN = ("Py", "_Py", "_ITM", "__gmon", "_ZTH")

# What a name looked up with dlsym looks like. aclnn* kernels are left out on purpose: torch_npu
# then says itself, by name, that the kernel is not there.
LITERAL = re.compile(
    r"^(acl(?:rt|mdl|op|tdt|prof|sys|sk|Create|Destroy|Get|Set|Query|Gen|Stress|Profiling)\w+"
    r"|Hccl[A-Z]\w+|Hcomm[A-Za-z]+)$",
    re.MULTILINE,
)
DECLARED = re.compile(r"\b((?:acl|Hccl)\w+)\s*\(")

# Stubs that must not say "success": they would compute or move data.
MOVES_DATA = re.compile(
    r"^(aclnn\w+|aclblas\w+|aclop(CompileAndExecute|Execute)\w*"
    r"|Hccl(All|Reduce|Scatter|Broadcast|Send|Recv|BatchSendRecv)\w*"
    r"|aclmdlExecute\w*|aclmdlRICaptureTask\w+|aclmdlRI(Update|Build\w+)"
    r"|aclrtMemcpy\w+|aclrtMemset\w+|aclrtLaunch\w+|_ZN3atb\d+CreateOperation\w+)$"
)


class BuildError(SystemExit):
    """The build cannot go on; the text says what to do."""


def run(*command: str | Path) -> str:
    """Output of a command; raises with its errors."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"cannsim: {' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


def require(tools: Sequence[str]) -> None:
    """Fail if a program is missing."""
    missing = [t for t in tools if shutil.which(t) is None]
    if missing:
        raise BuildError(
            f"cannsim: cannot build without {', '.join(missing)}: install gcc, g++ and binutils "
            "(Debian: apt-get install g++ binutils)"
        )


def symbols(path: Path, which: str) -> set[str]:
    """Names of dynamic symbols, without versions."""
    lines = run("nm", "-D", which, path).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line.strip()}


def torch_libraries() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("cannsim: run build.py with a Python that has torch")
    return sorted((Path(spec.origin).parent / "lib").glob("*.so*"))


def system_libraries() -> Iterable[Path]:
    """The C and C++ libraries, wherever this machine keeps them."""
    loader = "ld-linux-aarch64.so.1" if _machine() == "aarch64" else "ld-linux-x86-64.so.2"
    for name in ("libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0",
                 "libdl.so.2", "librt.so.1", loader):  # fmt: skip
        path = Path(run("g++", f"-print-file-name={name}").strip())
        if path.is_absolute() and path.exists():
            yield path


def _machine() -> str:
    return run("g++", "-dumpmachine").split("-")[0]


def names_needed(npu: Path) -> set[str]:
    """Every CANN name that the wheel links to, looks up, or declares."""
    wanted = ("libtorch_npu.so", "libtensorpipe.so", "libop_plugin_atb.so", "libnpu_profiler.so")
    modules = [npu / "lib" / m for m in wanted if (npu / "lib" / m).exists()]
    modules += [*npu.glob("_C*.so"), *npu.glob("dynamo/torchair/core/*.so")]
    if not modules:
        raise BuildError(f"cannsim: no torch_npu libraries under {npu}")
    needed, defined, literals, declared = set(), set(), set(), set()
    for module in modules:
        needed |= symbols(module, "--undefined-only")
        literals |= set(LITERAL.findall(run("strings", "-n", "5", module)))
    for library in [*modules, *torch_libraries(), *system_libraries()]:
        defined |= symbols(library, "--defined-only")
    for folder in ("acl", "hccl"):
        for header in (npu / "include/third_party" / folder).rglob("*.h"):
            declared |= set(DECLARED.findall(header.read_text(errors="replace")))
    linked = {n for n in needed - defined if not n.startswith(FOREIGN)}
    return (linked | literals | declared) - ABSENT - {"aclError"}


def compile_native(npu: Path, out: Path) -> tuple[list[Path], set[str]]:
    """Object files of native/, and the names that they define."""
    objects, defined = [], set()
    acl = npu / "include/third_party/acl/inc"
    common = ["-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-I", str(NATIVE)]
    for source in sorted([*NATIVE.glob("*.c"), *NATIVE.glob("*.cpp")]):
        compiler = ["gcc", "-std=gnu11"]
        if source.suffix == ".cpp":
            compiler = ["g++", "-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=0", f"-I{acl}"]
        target = out / f"{source.name}.o"
        run(*compiler, *common, "-c", source, "-o", target)
        objects.append(target)
        for line in run("nm", "--defined-only", "-g", target).splitlines():
            *_, kind, name = line.split()
            if kind in "TWVi":
                defined.add(name)
    return objects, defined


def stub_source(names: Sequence[str]) -> str:
    """C for all stubs. Every return type that occurs is an integer or a pointer, so long will do.

    (C rather than assembler: it is the same text for every processor.)
    """
    lines = ["long cannsim_stub_called(int);"]
    lines += [f"long {name}(void) {{ return cannsim_stub_called({i}); }}"
              for i, name in enumerate(names)]  # fmt: skip
    lines.append(f"const int cannsim_stub_count = {len(names)};")
    quoted = ", ".join(f'"{n}"' for n in names)
    lines.append(f"const char *const cannsim_stub_names[] = {{ {quoted} }};")
    flags = ", ".join(str(int(bool(MOVES_DATA.match(n)))) for n in names)
    lines.append(f"const unsigned char cannsim_stub_moves_data[] = {{ {flags} }};")
    return "\n".join(lines) + "\n"


def fingerprint(site: Path) -> str:
    """Changes when the libraries would: our sources, the wheel, the processor."""
    digest = hashlib.sha256(_machine().encode())
    for source in [Path(__file__), *sorted(NATIVE.iterdir())]:
        digest.update(source.read_bytes())
    for wheel in sorted(site.glob("torch_npu-*.dist-info/RECORD")):
        digest.update(str(wheel.parent).encode() + wheel.read_bytes())
    return digest.hexdigest()


def build(site: Path, out: Path) -> bool:
    """Build into `out`; False if it was up to date."""
    require(["gcc", "g++", "nm", "strings"])
    npu = site / "torch_npu"
    if not npu.is_dir():
        raise BuildError(f"cannsim: {site} holds no torch_npu")
    mark = fingerprint(site)
    stamp = out / STAMP
    if stamp.exists() and stamp.read_text() == mark:
        return False
    out.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    objects, real = compile_native(npu, out)
    stubs = sorted(names_needed(npu) - real)
    data = [n for n in stubs if n.startswith(("_ZTI", "_ZTV", "_ZTS"))]
    if data:
        raise BuildError(f"cannsim: the wheel needs C++ data, which has no stub: {data}")
    generated = out / "stub_functions.c"
    generated.write_text(stub_source(stubs))
    stub_object = out / "stub_functions.o"
    run("gcc", "-O1", "-fPIC", "-fno-builtin", "-w", "-c", generated, "-o", stub_object)
    link = ["g++", "-shared", "-fPIC"]
    run(*link, "-o", out / MAIN, *objects, stub_object, f"-Wl,-soname,{MAIN}", "-lpthread", "-ldl")
    empty = out / "empty.c"
    empty.write_text("")
    for name in SHELLS:
        run(*link, "-o", out / name, empty, "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed",
            f"-L{out}", "-lcannsim", f"-Wl,-soname,{name}")  # fmt: skip
    (out / "names_with_body.txt").write_text("\n".join(sorted(real)) + "\n")
    (out / "names_of_stubs.txt").write_text("\n".join(stubs) + "\n")
    stamp.write_text(mark)
    print(f"cannsim: {len(real)} functions with a body, {len(stubs)} stubs, in {out}")
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--torch-npu", type=Path, required=True, metavar="SITE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    if not build(args.torch_npu.resolve(), args.out.resolve()):
        print(f"cannsim: {args.out} is up to date")


if __name__ == "__main__":
    main(sys.argv[1:])
