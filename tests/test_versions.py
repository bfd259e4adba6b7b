"""Which PyTorch is taken, and what is said of the software that was found."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ascend_sp
from ascend_sp.runtime import versions
from toy import SelfAttention

PACKAGE = Path(ascend_sp.__file__).parent
IMPORT = "import torch\ntorch.__version__ = {!r}\nimport ascend_sp, ascend_sp.compiler.backend"


def imported(version: str) -> subprocess.CompletedProcess[str]:
    """What `import ascend_sp` says beside a PyTorch that gives this for its version."""
    line = [sys.executable, "-c", IMPORT.format(version)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git12", "2.12.1+cu130", "2.15.3", "main"])
def test_tested_releases_are_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_torch(version)


def test_an_older_one_is_refused_by_name_of_the_oldest() -> None:
    with pytest.raises(ImportError, match=r"needs torch 2\.10 or newer, and this is torch 2\.9\.1"):
        versions.check_torch("2.9.1")
    done = imported("1.13.1+cpu")
    assert done.returncode != 0
    assert "needs torch 2.10 or newer, and this is torch 1.13.1+cpu" in done.stderr


def test_a_newer_one_is_a_warning_that_names_the_tested_range_once() -> None:
    done = imported("2.16.0.dev20261201")
    assert done.returncode == 0, done.stderr
    said = "UserWarning: ascend_sp is tested with torch 2.10 to 2.15, and this is torch 2.16.0.dev"
    assert done.stderr.count(said) == 1


def test_the_range_is_what_pip_is_told() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    oldest = ".".join(map(str, versions.OLDEST))
    assert f'dependencies = ["torch>={oldest}",' in text
    assert f'version = "{versions.VERSION}"' in text
    assert ascend_sp.__version__ == versions.VERSION


def test_no_version_is_compared_anywhere_else() -> None:
    """Elsewhere what differs is looked for, where the private parts of PyTorch are."""
    compares = re.compile(
        r"torch\.__version__|version_info|TorchVersion|\bpackaging\b|importlib\.meta"
    )
    found = {
        str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if compares.search(f.read_text())
    }
    assert found == {"runtime/versions.py"}


def test_a_difference_is_looked_for_beside_private_names_and_says_of_which_versions() -> None:
    looks = re.compile(r"except ImportError|hasattr\((torch|config|dist)\b")
    for file in (
        f for layer in ("compiler", "passes", "runtime") for f in (PACKAGE / layer).rglob("_*.py")
    ):
        lines = file.read_text().splitlines()
        for i, line in enumerate(lines):
            if looks.search(line):
                assert re.search(r"PyTorch 2\.\d", "\n".join(lines[max(0, i - 3) : i + 2])), line


def test_what_was_found_is_told() -> None:
    found = versions.software()
    assert str(found) == (
        f"ascend_sp {ascend_sp.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()} on {platform.machine()}"
    )
    npu = versions.Software("1", "2.10.0", "3.12.1", "aarch64", "2.10.0.post7", "9.1.0", "910B3")
    assert str(npu) == (
        "ascend_sp 1, torch 2.10.0, torch_npu 2.10.0.post7, CANN 9.1.0, 910B3, "
        "Python 3.12.1 on aarch64"
    )


def test_it_stands_in_reports_and_errors(tmp_path: Path) -> None:
    told, model, x = str(versions.software()), SelfAttention(12, 3), torch.randn(1, 6, 12)
    found = ascend_sp.explain(model, x, explain_options={"dump_dir": str(tmp_path)})
    assert found.as_dict()["graphs"][0]["software"]["torch"] == str(torch.__version__)
    assert str(found).splitlines()[2] == told
    (page,) = tmp_path.glob("*/*/summary.md")
    assert page.read_text().splitlines()[2] == told

    with pytest.raises(ascend_sp.ConfigError) as e:
        ascend_sp.Config.load({"targte": "eager"})
    assert str(e.value) == f"{e.value.reason}\n[{told}]"
    assert "targte" in e.value.reason and told not in e.value.reason


def test_it_stands_beside_errors_that_are_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(gm: torch.fx.GraphModule, ctx: object) -> None:
        raise KeyError("something")

    with torch.no_grad(), pytest.raises(Exception, match="something"):
        torch.compile(SelfAttention(12, 3), backend="ascend_sp", options={"pre_passes": fails})(
            torch.randn(1, 6, 12)
        )
    assert f"failed to compile with {versions.software()}" in capsys.readouterr().err
