"""The library that the patch is for is made up here: only its names matter."""

from __future__ import annotations

from pathlib import Path

import cuda_build
import pytest

HEADS = b"pinned_reserve_s_segment_size_mb" + b"per_process_memo_memory_fraction"
"""What the wheels of 2.10.0 to 2.15.0 hold, one constant of 16 bytes behind the other."""
REST = b"\0pinned_reserve_segment_size_mb\0per_process_memory_fraction is invalid\0"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / cuda_build.LIBRARY).parent.mkdir(parents=True)
    return tmp_path


def test_both_names_are_replaced_in_a_new_file(site: Path) -> None:
    path, elsewhere = site / cuda_build.LIBRARY, site / "linked"
    path.write_bytes(REST + HEADS + REST)
    path.chmod(0o755)
    elsewhere.hardlink_to(path)
    assert cuda_build.patch(site)
    renamed = b"pinned_reserve_s_segment_size_mB" + b"per_process_memo_memory_fractioN"
    assert path.read_bytes() == REST + renamed + REST
    assert path.stat().st_mode & 0o777 == 0o755
    assert elsewhere.read_bytes() == REST + HEADS + REST
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not cuda_build.patch(site)  # nothing is left to do


@pytest.mark.parametrize("found", [HEADS[:32], HEADS[32:], HEADS + HEADS, REST])
def test_another_library_is_left_alone(site: Path, found: bytes) -> None:
    path = site / cuda_build.LIBRARY
    path.write_bytes(found)
    with pytest.raises(cuda_build.PatchError, match="is expected"):
        cuda_build.patch(site)
    assert path.read_bytes() == found


def test_a_cpu_build_needs_nothing(site: Path) -> None:
    assert not cuda_build.patch(site)
    with pytest.raises(cuda_build.PatchError, match="holds no torch"):
        cuda_build.patch(site / "torch")
