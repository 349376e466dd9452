"""Scores of a model before and after each owner of experts has left it, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from fedalign.config.run import Config
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from fedalign.moe.part import check_without, without

T = TypeVar("T")


def by_leaving(moe: MoEModel, owners: Sequence[str], score: Callable[[MoEModel], T]) -> Iterator[tuple[str | None, T]]:
    """The score of the whole model, and those without the experts of each owner; who left, None: nobody.

    Of what is of no expert there is one copy for all; the experts that stay are copied, one owner after another.

    Args:
        moe: stays as it is.
        owners: of experts.
        score: of a model.

    Raises:
        UserError: As `moe.part.check_without`, before anything is scored.
    """
    for name in owners:
        check_without(moe, name)
    yield None, score(moe)
    for name in owners:
        yield name, score(without(moe, name))


def not_told(config: Config, moe: MoEModel, rows: int) -> str:
    """Why a run does not score its finished model so; empty: it does, or nobody owns an expert.

    Args:
        config: of the run.
        moe: its model.
        rows: that all clients have held out.
    """
    owners, most = moe.layout.owners, config.evaluation.leaving
    if not owners:
        return ""
    reasons = {
        "with [privacy] clients tell no scores": config.privacy.on,
        "privacy.masked = true: sums over clients alone are told, and each score is of one": config.privacy.masked,
        "evaluation.clients = false": not config.evaluation.clients,
        "no client holds out rows to be scored on": not rows,
        f"evaluation.leaving = {most}, and owners of experts are {len(owners)}": len(owners) > most,
    }
    try:
        for name in owners:
            check_without(moe, name)
    except UserError as error:
        reasons[str(error).rstrip(".")] = True
    return next((reason for reason, holds in reasons.items() if holds), "")
