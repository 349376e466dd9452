"""Checks of the machine: versions, device, memory, disk."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedalign.config.run import Config
from fedalign.doctor.estimate import SiteEstimate
from fedalign.doctor.report import Check, Examination, Verdict
from fedalign.federation.workers import cores
from fedalign.moe.load import hardware, pick_device
from fedalign.parallel import SPLIT
from fedalign.server.rounds import round_half_up
from fedalign.units import size

PACKAGE = "fedalign-moe"
NAMED = ("torch", "transformers", "flwr")  # told even if they fit
COMFORT = 0.8  # share of what is there that may be taken without a warning


def check_versions(found: Examination, extra: str = "") -> None:
    """Python, and every package that the package metadata names, in the range that it names."""
    try:
        about = metadata.metadata(PACKAGE)
        requirements = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        found.add("packages", "warning", f"{PACKAGE} is not installed, so nothing says which fit", "pip install it.")
        return
    version, rule = sys.version.split()[0], str(about["Requires-Python"] or "")
    fits = SpecifierSet(rule).contains(version, prereleases=True)
    found.add("python", "ok" if fits else "failed", f"{version} (supported: {rule})", "Use a supported Python.")
    fitting = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            check = version_check(requirement, extra)
            if check.verdict != "ok":
                found.checks.append(check)
            elif requirement.name in NAMED:
                fitting.append(check.found)
    found.add("packages", "ok", ", ".join(fitting))


def version_check(requirement: Requirement, extra: str = "") -> Check:
    """Whether a package is there, and in the supported range."""
    name, rule = requirement.name, requirement.specifier
    try:
        there = metadata.version(name)
    except metadata.PackageNotFoundError:
        package = f"{PACKAGE}[{extra}]" if extra else PACKAGE
        return Check(name, "failed", f"not installed (supported: {rule})", f"pip install '{package}'")
    told = f"{name} {there} (supported: {rule})"
    if rule.contains(there, prereleases=True):
        return Check(name, "ok", told)
    return Check(name, "failed", told, f"pip install '{name}{rule}'")


def check_device(found: Examination, name: str) -> str | None:
    """The device that trains; None if it is not there."""
    device = found.attempt("device", lambda: pick_device(name))
    if device is None:
        return None
    free = free_memory(device)
    left = "unknown" if free is None else size(free)
    found.add("device", "ok", f"{device}: {hardware(device)}, {left} of memory free")
    return device


def check_cores(found: Examination, config: Config) -> None:
    """Whether clients in one process could use more cores than they do."""
    device, run = found.attempt("device", lambda: pick_device(config.run.device)), config.run
    if device != "cpu":
        return
    asked = round_half_up(config.clients.sample * config.clients.count)
    idle = cores() // (run.workers * max(1, run.threads))
    told = f"{cores()} cores, run.workers = {run.workers}, run.threads = {run.threads}"
    if run.workers == 1 and (more := min(cores(), asked)) > 1 and sys.platform == "linux":
        told += (
            f". If memory allows, run.workers = {more} trains so many clients side by side; the results are the same"
        )
    found.add(
        "cores",
        "ok" if idle else "warning",
        told,
        f"Choose run.workers times run.threads of at most {cores()}: more wait for each other.",
    )


def free_memory(device: str = "cpu") -> int | None:
    """Bytes that a new process could take on this device; None where the system does not say."""
    if device == SPLIT:
        return sum(int(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count()))
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    sources = (available_in(Path("/proc/meminfo")), left_in_group(Path("/sys/fs/cgroup")))
    return min((nbytes for nbytes in sources if nbytes is not None), default=None)


def available_in(meminfo: Path) -> int | None:
    """Bytes of memory that Linux calls available."""
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def left_in_group(group: Path) -> int | None:
    """Bytes of memory that a container's own limit leaves; its file cache can be given back."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    cache = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    return None if limit == "max" else int(limit) - used + cache


def memory_checks(device: str, expected: SiteEstimate, activations: int | None, free: int | None) -> list[Check]:
    """Whether training fits; on a GPU also what its host needs.

    Args:
        device: the one that trains.
        expected: what it takes.
        activations: bytes measured; None: not known yet.
        free: bytes free on the device before anything was loaded.
    """
    told = "activations not counted" if activations is None else f"activations {size(activations)}"
    parts = f"training {size(expected.training)}, {told}"
    host = expected.exchange + expected.carrier
    rest = f"messages {size(expected.exchange)}, Flower's own process {size(expected.carrier)}"
    needed = expected.training + (activations or 0)
    if not device.startswith(("cuda", SPLIT)):
        return [_memory_check("memory", device, needed + host, free, f"{parts}, {rest}")]
    return [
        _memory_check("memory", device, needed, free, parts),
        _memory_check("memory of the host", "this machine", max(host, expected.loading), free_memory(), rest),
    ]


def _memory_check(name: str, where: str, needed: int, free: int | None, parts: str) -> Check:
    left = "unknown" if free is None else size(free)
    verdict = _room(needed, free)
    remedy = "Lower limits.batch_tokens, ask for wire.dtype = bfloat16, or use a smaller model or a larger machine."
    told = f"{left} free on {where}, needs about {size(needed)}: {parts}"
    return Check(name, verdict, told, "" if verdict == "ok" else remedy)


def check_disk(found: Examination, folder: Path, needed: int, what: str) -> None:
    """There is room for what a run leaves."""
    free = shutil.disk_usage(folder).free
    found.add(
        "disk",
        _room(needed, free),
        f"{size(free)} free in {folder}, needs {size(needed)} for {what}",
        "Free some, or move the folder to a larger disk.",
    )


def _room(needed: int, free: int | None) -> Verdict:
    if free is None or needed <= COMFORT * free:
        return "ok"
    return "warning" if needed <= free else "failed"


def check_writable(found: Examination, folder: Path) -> None:
    """The folder is there, or can be made."""
    there = existing(folder)
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    found.add(
        "output folder",
        "ok" if writable else "failed",
        f"{folder}: {'can be written' if writable else f'{there} cannot be written'}",
        "Choose another with --out when you run.",
    )


def existing(path: Path) -> Path:
    """The path itself, or the closest parent that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
