"""Preflight: everything that would stop a site or the coordinator, found before anything is trained or sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedalign.client.spent import PrivacyLedger
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.config.unused import unused
from fedalign.data.formats import FORMATS, Example, load_examples
from fedalign.doctor.data import check_data, check_lengths, check_parts, guess_kind
from fedalign.doctor.estimate import estimate_site, parameter_counts
from fedalign.doctor.link import check_key, check_superlink
from fedalign.doctor.machine import (
    check_cores,
    check_device,
    check_disk,
    check_versions,
    check_writable,
    existing,
    free_memory,
    memory_checks,
)
from fedalign.doctor.model import check_model, check_time, check_traffic, check_weights, measured
from fedalign.doctor.privacy import ASSUMED, check_privacy
from fedalign.doctor.report import Examination
from fedalign.doctor.what_leaves import tokens_told
from fedalign.files import KEPT_ROUNDS
from fedalign.units import clock


def examine_site(folder: SiteFolder, config: Config | None) -> Examination:
    """Look at everything of a site.

    Args:
        folder: the site.
        config: the coordinator's configuration; None: what depends on it is guessed, and said so.
    """
    found, link = Examination(), folder.config.coordinator
    check_versions(found, "flower")
    check_key(found, folder)
    found.add("consent", "ok", folder.config.consent.told)
    certificates = Path(folder.resolve(link.root_certificates)) if link.root_certificates else None
    check_superlink(found, link.superlink, certificates, is_server=False)
    local = found.attempt("limits", lambda: folder.localise(config or Config()))
    if local is None:
        return found
    if config is None:
        local = _guessed(found, folder, local)
    else:
        check_engine(found, config)
    device = check_device(found, local.run.device)
    examples = check_data(found, local)
    if config is None and folder.config.model.path is None:
        found.add(
            "model",
            "warning",
            "site.toml names none, and without a configuration nobody does",
            f"Give the coordinator's: fedalign doctor CONFIG.toml --site {folder.path}",
        )
        return found
    bench = check_model(found, local)
    if bench is not None:
        _examine_training(found, folder, bench, config or local, examples, device)
    return found


def _examine_training(
    found: Examination,
    folder: SiteFolder,
    bench: Workbench,
    asked: Config,
    examples: Sequence[Example],
    device: str | None,
) -> None:
    """Checks of model, data and machine together; the weights are loaded only if they fit."""
    expected, config = estimate_site(bench, folder.config.name, folder.consent), bench.config
    fits = bool(examples) and check_lengths(found, bench, examples)
    client = check_parts(found, bench, asked, folder) if fits else None
    if client is not None:
        frozen = sum(bench.moe.layout.sizes[group] for group in folder.consent.frozen(bench.moe.layout))
        budget = folder.config.privacy
        ledger = PrivacyLedger(folder.path, budget.epsilon_total, budget.delta)
        trained = parameter_counts(bench)[1] - frozen
        check_privacy(found, config, client.examples, trained, asked.federation.min_sites, ledger)
    check_traffic(found, expected)
    found.add("tokens", "ok", tokens_told(folder.config.name, bench.moe.layout, config, folder.consent))
    check_disk(found, folder.path, expected.disk, "kept rounds")
    if device is None:
        return
    free = free_memory(device)
    memory = memory_checks(device, expected, None, free)
    if any(check.verdict == "failed" for check in memory):
        found.checks += memory
        found.add("weights", "warning", "not loaded: memory would not suffice", "See above.")
        return
    loaded = check_weights(found, config)
    if loaded is None or client is None:
        found.checks += memory
        return
    step = measured(found, loaded, client)
    if step is not None:
        found.checks += memory_checks(device, expected, step.activations, free)
        check_time(found, config, client, step)


def examine_coordinator(config: Config, out: Path) -> Examination:
    """Look at everything of the coordinator: the model's configuration is read, its weights are not.

    Args:
        config: the run's.
        out: where its results would go.
    """
    found, options, data = Examination(), config.federation, config.data
    check_versions(found, "" if options.engine == "in_process" else "flower")
    check_engine(found, config)
    for note in unused(config):
        found.add("settings", "warning", note, "Leave out what has none, or change the other.")
    if options.engine == "flower":
        _check_policy(found, config)
        certificates = Path(options.root_certificates) if options.root_certificates else None
        check_superlink(found, options.superlink, certificates, is_server=True)
    if data.test is not None:
        source = data.test
        tests = found.attempt("test set", lambda: load_examples(source, data, "test", config.run.seed))
        if tests is not None:
            found.add("test set", "ok", f"{len(tests):,} examples from {source}")
    bench = check_model(found, config)
    check_writable(found, out)
    if options.engine == "in_process":
        check_cores(found, config)
    if bench is not None:
        total, trained = parameter_counts(bench)
        sites = config.clients.count if options.engine != "flower" else options.min_sites
        check_privacy(found, config, ASSUMED, trained, sites)
        needed = 4 * (trained * (KEPT_ROUNDS + 1) + 2 * total)
        check_disk(found, existing(out), needed, "checkpoints and two models")
    return found


def check_engine(found: Examination, config: Config) -> None:
    """The configuration is one that sites can take part in."""
    engine = config.federation.engine
    found.add(
        "configuration",
        "ok" if engine == "flower" else "warning",
        f"{config.algorithm.name}, {config.run.rounds} rounds, federation.engine = {engine!r}",
        'Sites take part only with federation.engine = "flower".',
    )
    if engine == "flower" and FORMATS[config.data.kind].classes and not config.data.labels:
        found.add(
            "data.labels",
            "failed",
            "empty: sites see their own rows alone, so all classes must be named",
            'For example data.labels = ["World", "Sports"] in the configuration.',
        )


def _check_policy(found: Examination, config: Config) -> None:
    options = config.federation
    late = "asked again" if options.late == "ask_again" else "left out until their reply is there"
    missed = f"left out for good after {options.max_missed} missed rounds" if options.max_missed else "never given up"
    found.add(
        "policy",
        "ok",
        f"at least {options.min_sites} sites within {clock(options.wait_seconds)}, "
        f"{clock(options.timeout_seconds)} a stage; late ones are {late}, {missed}",
    )


def _guessed(found: Examination, folder: SiteFolder, local: Config) -> Config:
    """The configuration for want of one: its kind of data from the columns."""
    kind = guess_kind(local.data)
    found.add(
        "configuration",
        "warning",
        f"none given: defaults, and data.kind = {kind!r} guessed from the columns",
        f"Check with the coordinator's: fedalign doctor CONFIG.toml --site {folder.path}",
    )
    return local.model_copy(update={"data": local.data.model_copy(update={"kind": kind})})
