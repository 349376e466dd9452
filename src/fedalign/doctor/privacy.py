"""The cost of a private run, and whether anything can be learnt through its noise; before it is trained."""

from __future__ import annotations

import math

from fedalign.client.accountant import COUNT_NOISE, Terms, epsilon, terms
from fedalign.client.spent import PrivacyLedger
from fedalign.config.run import Config
from fedalign.doctor.report import Examination, Verdict

ASSUMED = 1000  # examples of a site of which nothing is known
LOUD, HOPELESS = 1.0, 10.0  # lengths of noise in those of the longest signal
WEAK = 20.0  # epsilon beyond which hardly anything is hidden
REMEDY = (
    'Train fewer values (tuning.kind = "lora" or "router"), with more examples a step (training.accumulate), in more '
    "rounds, or with a larger epsilon."
)


def check_privacy(
    found: Examination, config: Config, examples: int, trained: int, sites: int, ledger: PrivacyLedger | None = None
) -> None:
    """Say what a private run costs a site with so many examples, and how loud its noise is; nothing is drawn.

    Args:
        found: takes what was found.
        config: the run's.
        examples: of the site.
        trained: values that it trains.
        sites: over which noise is averaged.
        ledger: the site's; None: of no site in particular.
    """
    if not config.privacy.on:
        return
    agreed = found.attempt("privacy", lambda: terms(config, examples))
    if agreed is None:
        return
    found.add(
        "privacy", *_cost(agreed, assumed=ledger is None), "An epsilon of 1 to 8 is usual.", private=ledger is not None
    )
    if ledger is not None:
        _check_budget(found, agreed, ledger)
    _check_noise(found, agreed, trained, sites, ledger is not None)


def noise_ratio(agreed: Terms, trained: int, sites: int) -> float:
    """The length of a run's noise, averaged over sites, in lengths of the longest signal that there could be.

    Noise of T steps is σ·C·sqrt(T·d) / B long, and sqrt(sites) times shorter on average. All examples together move
    the weights by at most C·T, which takes gradients that all point the same way.
    """
    steps = agreed.steps * agreed.rounds
    return agreed.noise * math.sqrt(trained) / (agreed.batch * math.sqrt(steps * sites))


def _cost(agreed: Terms, assumed: bool) -> tuple[Verdict, str]:
    cost, said = agreed.epsilon, ", say," if assumed else ""
    return (
        "warning" if cost > WEAK else "ok",
        f"epsilon {cost:.3g} at delta {agreed.delta:g} for each example of a site that has{said} {agreed.examples:,}: "
        f"{agreed.rounds} rounds of {agreed.steps} steps, each of {agreed.batch} examples on average and with noise "
        f"of {agreed.noise:.3g} lengths of privacy.max_grad_norm{_loads(agreed)}",
    )


def _loads(agreed: Terms) -> str:
    return "" if agreed.loads_noise is None else f"; loads with noise of {agreed.loads_noise:g}"


def _check_budget(found: Examination, agreed: Terms, ledger: PrivacyLedger) -> None:
    lines = found.attempt("budget", ledger.lines)
    if lines is None:
        return
    before = [line.release for line in lines]
    spent, after = epsilon(before, ledger.delta), epsilon((*before, *agreed.run), ledger.delta)
    if ledger.most is None:
        found.add(
            "budget",
            "warning",
            f"none: {spent:.3g} spent so far, {after:.3g} after this run, and nothing would stop it",
            "Set one in site.toml: [privacy] epsilon_total.",
        )
        return
    found.add(
        "budget",
        "failed" if after > ledger.most else "ok",
        f"{spent:.3g} of {ledger.most:g} spent at delta {ledger.delta:g}, {after:.3g} after this run",
        "The site would stop before the run ends: ask for a smaller privacy.epsilon, or fewer rounds.",
    )


def _check_noise(found: Examination, agreed: Terms, trained: int, sites: int, private: bool) -> None:
    ratio = noise_ratio(agreed, trained, sites)
    told = (
        f"of all {agreed.rounds} rounds, averaged over {sites} sites, {ratio:.3g} times as long as the longest move "
        f"that the examples could make together ({trained:,} values)"
    )
    if ratio > HOPELESS:
        found.add("noise", "warning", f"hopeless: {told}", REMEDY, private)
    elif ratio > LOUD:
        found.add("noise", "warning", f"loud: {told}", REMEDY, private)
    else:
        found.add("noise", "ok", told, private=private)
    if agreed.examples < 4 * COUNT_NOISE:
        found.add(
            "examples",
            "warning",
            f"the number of examples is told with noise of {COUNT_NOISE:g}, and there are {agreed.examples}",
            "A site with so few counts for a number that is mostly noise.",
            private,
        )
    elif agreed.loads_noise is not None:
        share = agreed.loads_noise / agreed.examples
        found.add(
            "loads",
            "ok" if share < 0.1 else "warning",
            f"told with noise of {100 * share:.3g} % of all examples for each expert",
            'Choose algorithm.name = "fedavg", which reads none.',
            private,
        )
