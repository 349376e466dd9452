"""Checks of a site's data. What they find tells something of it: it is for the site's own terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

from fedalign.client.memory import ClientData
from fedalign.client.open import site_client
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config, DataConfig
from fedalign.config.site import SiteFolder
from fedalign.data.encode import IGNORED, Encoded, Encoder
from fedalign.data.formats import FORMATS, OURS, Example, load_examples
from fedalign.data.sources import read_rows
from fedalign.doctor.report import Examination
from fedalign.errors import DataError, UserError

GUESS_ROWS = 20
SHOWN_LABELS = 20


def check_data(found: Examination, config: Config) -> list[Example]:
    """Every row can be read as the task asks; the labels seen."""
    data = config.data.model_copy(update={"max_train": 0})  # a site draws from all of it
    examples = found.attempt("data", lambda: load_examples(data.train, data, "train", config.run.seed), private=True)
    if examples is None:
        return []
    found.add("data", "ok", f"{len(examples):,} examples, read as {data.kind} from {data.train}")
    seen = Counter(example.label for example in examples if example.label)
    if FORMATS[data.kind].classes and seen:
        unseen = [name for name in data.labels if name not in seen]
        told = ", ".join(f"{name} {count:,}" for name, count in seen.most_common(SHOWN_LABELS))
        more = f" and {len(seen) - SHOWN_LABELS} more" if len(seen) > SHOWN_LABELS else ""
        found.add("labels", "ok", f"{told}{more}" + (f"; none of {', '.join(unseen)}" if unseen else ""), private=True)
    return examples


def check_lengths(found: Examination, bench: Workbench, examples: Sequence[Example]) -> bool:
    """Every example fits the model; otherwise what becomes of those that do not."""
    limit, too_long = bench.encoder.max_length, bench.config.data.too_long
    unlimited = Encoder(bench.tokenizer, 0, bench.moe.is_seq2seq, decoder_start=bench.encoder.decoder_start)
    encoded = found.attempt("lengths", lambda: unlimited.encode(examples), private=True)
    if encoded is None:
        return False
    found.preview = preview(bench.tokenizer, encoded[0])
    lengths = sorted(max(len(one.input_ids), len(one.labels)) for one in encoded)
    over = sum(length > limit for length in lengths) if limit else 0
    refused = over > 0 and too_long == "error"
    fate = "refused" if too_long == "error" else "cut"
    found.add(
        "lengths",
        "failed" if refused else "warning" if over else "ok",
        f"median {lengths[len(lengths) // 2]:,}, longest {lengths[-1]:,} tokens (at most {limit or 'any number'}): "
        + (f"{over:,} longer, {fate}" if over else "all fit"),
        'Shorten them, or ask the coordinator for a larger data.max_length or data.too_long = "truncate".',
        private=True,
    )
    return not refused


def check_parts(found: Examination, bench: Workbench, config: Config, folder: SiteFolder) -> ClientData | None:
    """There is enough to train on, and to be scored on; nothing is drawn for good."""

    def opened() -> ClientData:
        try:
            return site_client(folder, bench, config, "doctor")[0]
        except DataError as error:
            raise UserError(str(error)) from None

    client = found.attempt("parts", opened, private=True)
    if client is None:
        return None
    held = len(client.held_out) if client.held_out is not None else 0
    found.add("parts", "ok", f"{client.examples:,} examples to train on, {held:,} held out to be scored on")
    return client


def preview(tokenizer: Any, one: Encoded) -> list[tuple[str, bool]]:
    """One example as the model reads it, cut where answers begin and end: text, and whether the loss is on it."""
    if one.decoder_input_ids is not None:
        return [(tokenizer.decode(one.input_ids), False), (tokenizer.decode(one.labels), True)]
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(one.input_ids, one.labels, strict=True):
        is_answer = label != IGNORED
        if not pieces or pieces[-1][1] != is_answer:
            pieces.append(([], is_answer))
        pieces[-1][0].append(token)
    return [(tokenizer.decode(ids), is_answer) for ids, is_answer in pieces]


def guess_kind(data: DataConfig) -> str:
    """A guess at the kind of the first rows, for want of a configuration that says it; labels are never ignored."""
    try:
        rows = list(islice(read_rows(data.train, data, "train", []), GUESS_ROWS))
    except UserError:  # whoever reads it for a purpose says what is wrong
        return "text"
    plain = "classification" if any(data.columns.label in row.values for row in rows) else "text"
    for kind, form in OURS.items():
        try:
            list(form.read(rows, data.model_copy(update={"kind": kind}), None))
        except UserError:
            continue
        return plain if kind == "text" else kind
    return plain
