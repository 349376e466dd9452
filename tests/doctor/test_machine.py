"""Versions, memory and disk as the doctor judges them."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fedalign.doctor.estimate import SiteEstimate
from fedalign.doctor.machine import (
    available_in,
    check_device,
    check_disk,
    check_versions,
    check_writable,
    free_memory,
    left_in_group,
    memory_checks,
    version_check,
)
from fedalign.doctor.report import Examination

GB = 10**9


def estimate(training: int) -> SiteEstimate:
    return SiteEstimate(training, training // 4, GB, GB, 0, 0, 0, 0, 0)


def test_this_environment_is_supported() -> None:
    found = Examination()
    check_versions(found, "flower")
    assert [check.verdict for check in found.checks] == ["ok", "ok"]
    for name in ("torch", "transformers", "flwr"):
        assert name in found.checks[1].found


def test_flower_is_looked_for_where_it_is_needed() -> None:
    found = Examination()
    check_versions(found)
    assert "flwr" not in found.checks[1].found


@pytest.mark.parametrize(
    ("requirement", "verdict", "words"),
    [
        ("torch>=2", "ok", "supported: >=2"),
        ("torch>=99", "failed", "supported: >=99"),
        ("torch<1", "failed", "supported: <1"),
        ("no-such-package>=1", "failed", "not installed"),
    ],
)
def test_versions_outside_the_range_fail(requirement: str, verdict: str, words: str) -> None:
    check = version_check(Requirement(requirement), "flower")
    assert check.verdict == verdict
    assert words in check.found
    assert bool(check.remedy) == (verdict == "failed")


def test_a_device_that_is_not_there_fails() -> None:
    found = Examination()
    assert check_device(found, "cpu") == "cpu"
    assert check_device(found, "abacus") is None
    assert [check.verdict for check in found.checks] == ["ok", "failed"]


@pytest.mark.parametrize(("free", "verdict"), [(100, "ok"), (6, "warning"), (4, "failed")])
def test_memory_is_compared_with_what_is_free(free: int, verdict: str) -> None:
    (check,) = memory_checks("cpu", estimate(2 * GB), GB, free * GB)  # 5 GB: training, activations, messages, Flower
    assert check.verdict == verdict
    assert "needs about 5.0 GB" in check.found
    assert memory_checks("cpu", estimate(2 * GB), None, None)[0].verdict == "ok"


def test_a_gpu_and_its_host_are_two_questions() -> None:
    gpu, host = memory_checks("cuda:0", estimate(2 * GB), GB, 2 * GB)
    assert "needs about 3.0 GB" in gpu.found
    assert gpu.verdict == "failed"
    assert "needs about 2.0 GB" in host.found


def test_free_memory_is_the_systems_or_the_containers(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       7 kB\n")
    assert available_in(tmp_path / "meminfo") == 7 * 1024
    assert available_in(tmp_path / "none") is None
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 400\ninactive_file 300\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert left_in_group(tmp_path) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in_group(tmp_path) is None
    assert left_in_group(tmp_path / "none") is None
    here = free_memory()
    assert here is None or here > 0


def test_a_full_disk_fails(tmp_path: Path) -> None:
    found = Examination()
    check_disk(found, tmp_path, 1, "kept rounds")
    check_disk(found, tmp_path, 10**18, "kept rounds")
    assert [check.verdict for check in found.checks] == ["ok", "failed"]


def test_the_output_folder_must_be_one(tmp_path: Path) -> None:
    found = Examination()
    check_writable(found, tmp_path / "runs" / "a")
    (tmp_path / "file").touch()
    check_writable(found, tmp_path / "file" / "a")
    assert [check.verdict for check in found.checks] == ["ok", "failed"]
    assert not (tmp_path / "runs").exists()
