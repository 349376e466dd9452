"""A tuned model answers a person, a file and a test set: with the numbers of the run itself."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.data.formats import Example
from fedalign.data.sources import Row
from fedalign.errors import UserError
from fedalign.export.write import Wanted, export
from fedalign.inference.load import Source, configured, load
from fedalign.inference.scores import score
from fedalign.inference.talk import Sampling, Talk
from tests.conftest import SUBJECTS, Command, rows, write_jsonl
from tests.rendering.templates import CHATML
from tests.server.test_run import start

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Made:
    """`made(*overrides)`: the folder of a finished run, made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def make(*more: str) -> Path:
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("runs") / "run"
            start(runs[more], settings, "run.rounds=2", *more)
        return runs[more]

    return make


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run on instructions."""
    lines = [{"prompt": row["text"], "response": row["label"]} for row in rows()]
    folder = tmp_path_factory.mktemp("questions")
    write_jsonl(folder / "train.jsonl", lines[1::2])
    write_jsonl(folder / "test.jsonl", lines[::8])
    paths = [f"data.{split}={folder / f'{split}.jsonl'}" for split in ("train", "test")]
    return [*paths, "data.kind=instruction", "clients.partition=iid", "run.rounds=1"]


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_run_and_add_up(fedalign: Command, made: Made) -> None:
    run = made()
    code, out, errors = fedalign("evaluate", str(run), "--json")
    assert code == 0, errors
    scores, lines = json.loads(out), history(run)
    for name, line in (("start", lines[0]), ("tuned", lines[-1])):
        assert scores[name]["accuracy"] == line["accuracy"]
        assert scores[name]["loss"] == pytest.approx(line["loss_nats"], rel=1e-6)
        confusion = scores[name]["confusion"]
        assert list(confusion) == sorted(SUBJECTS)
        assert sum(sum(row.values()) for row in confusion.values()) == scores[name]["examples"] == 30
        right = sum(confusion[subject][subject] for subject in SUBJECTS)
        assert right / 30 == scores[name]["accuracy"]
        recalls = [one["recall"] * one["examples"] for one in scores[name]["classes"]]
        assert sum(recalls) == pytest.approx(right)
    assert len(scores["tuned"]["answered"]) == 10
    assert scores["tuned"]["answered"][0]["prompt"].endswith("\nLabel:")


def test_of_a_file_that_is_named_all_rows_are_scored(fedalign: Command, made: Made, texts: Path) -> None:
    run = made("data.max_test=7")
    for words, expected in (
        ((), 7),
        (("--data", texts / "test.jsonl"), 30),
        (("--data", texts / "test.jsonl", "--set", "data.max_test=5"), 5),
    ):
        code, out, errors = fedalign("evaluate", str(run), "--alone", "--json", *map(str, words))
        assert code == 0, errors
        assert json.loads(out)["tuned"]["examples"] == expected


@pytest.mark.parametrize("more", [(), ("tuning.kind=lora",), ("tuning.dtype=bfloat16",)])
def test_an_exported_model_scores_as_its_run(made: Made, tmp_path: Path, texts: Path, more: tuple[str, ...]) -> None:
    run = made(*more)
    export(Wanted(run, tmp_path / "out"), lambda _: None)
    bench = load(Source(str(tmp_path / "out")))
    of_run = load(Source(str(run)))
    from fedalign.data.formats import load_examples  # noqa: PLC0415 - of this test alone

    examples = load_examples(str(texts / "test.jsonl"), of_run.config.data, "test", 0)
    for scores in (score(bench, examples), score(of_run, examples)):
        assert scores.accuracy == history(run)[-1]["accuracy"]
        assert scores.loss == pytest.approx(history(run)[-1]["loss_nats"], rel=1e-6)


@pytest.mark.parametrize("more", [(), ('data.labels=["weather", "food", "animals"]',)])
def test_a_file_of_one_class_is_scored_among_all_that_the_model_knows(
    fedalign: Command, made: Made, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run, place = made(*more), tmp_path / "out"
    export(Wanted(run, place), lambda _: None)
    own = load(Source(str(run))).config.data.labels
    assert load(Source(str(place))).config.data.labels == own
    assert own == (("weather", "food", "animals") if more else tuple(sorted(SUBJECTS)))
    found = []
    for subject in SUBJECTS:
        write_jsonl(tmp_path / "one.jsonl", [row for row in rows() if row["label"] == subject])
        for model in (run, place):
            argv = ["evaluate", str(model), "--data", str(tmp_path / "one.jsonl"), "--json"]
            code, out, errors = fedalign(*argv, *(["--alone"] if model == run else []))
            assert code == 0, errors
            found.append(json.loads(out)["tuned"])
    assert found[::2] == found[1::2]
    assert any(scores["accuracy"] < 1 for scores in found)  # else any set of classes would do
    (place / "README.md").unlink()  # any model: nothing names its classes
    code, _, errors = fedalign("evaluate", str(place), "--data", str(tmp_path / "one.jsonl"))
    assert (code, "data.labels = []: which classes there are is not known" in errors) == (2, True)
    assert fedalign("chat", str(place))[0] == 2  # before anything is typed


def test_the_best_round_and_the_start_can_be_asked(made: Made) -> None:
    run, lines = made(), history(made())
    best = max(line["accuracy"] for line in lines)
    for source, accuracy in ((Source(str(run), best=True), best), (Source(str(run), start=True), lines[0]["accuracy"])):
        bench = load(source)
        tests = bench.test_set()
        assert tests is not None
        assert score(bench, tests.examples).accuracy == accuracy
    with pytest.raises(UserError, match="is no run's folder"):
        load(Source(str(run / "model"), best=True))


def test_a_classifier_answers_with_probabilities(made: Made) -> None:
    talk = Talk(load(Source(str(made()))), Sampling())
    found = talk.classes({"text": "rain falls in town"})
    assert found is not None
    assert set(found) == set(SUBJECTS)
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert talk.answer({"text": "rain falls in town"}) == next(iter(found))


def test_a_model_whose_answers_are_no_numbers_chooses_no_class(made: Made) -> None:
    bench = load(Source(str(made())))
    bench.moe.model.get_output_embeddings().weight.data.fill_(torch.nan)
    talk, examples = Talk(bench, Sampling()), [Example("rain", "weather", tuple(SUBJECTS))]
    for ask in (lambda: talk.classes({"text": "rain falls in town"}), lambda: score(bench, examples)):
        with pytest.raises(UserError, match=r"^the model's answers are no numbers \(nan\)\. Take another round"):
            ask()


def test_a_file_of_prompts_is_answered_row_by_row(
    fedalign: Command, made: Made, questions: list[str], tmp_path: Path
) -> None:
    run, prompts = made(*questions), tmp_path / "prompts.jsonl"
    write_jsonl(prompts, [{"prompt": "rain falls", "id": "a"}, {"prompt": "the dog runs", "id": "b"}])
    argv = ["generate", str(run), "--prompts", str(prompts), "--max-new-tokens", "4"]
    code, out, errors = fedalign(*argv, "--to", str(tmp_path / "out.jsonl"))
    assert code == 0, errors
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b"]
    assert all(line["generated"] for line in lines)
    (tmp_path / "prompts.txt").write_text("rain falls\n\nthe dog runs\n")
    code, out, _ = fedalign("generate", str(run), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4")
    assert [json.loads(line)["generated"] for line in out.splitlines()] == [line["generated"] for line in lines]
    code, _, errors = fedalign(*argv, "--to", str(tmp_path / "out.jsonl"))
    assert (code, "is there already" in errors) == (2, True)
    write_jsonl(prompts, [{"prompt": "rain falls", "generated": "before"}])
    code, _, errors = fedalign(*argv)
    assert (code, "has a column 'generated'" in errors) == (2, True)
    write_jsonl(prompts, [{"question": "rain falls"}])
    code, _, errors = fedalign(*argv)
    assert (code, "no column 'prompt'" in errors) == (2, True)


def test_a_file_of_prompts_is_read_as_the_run_reads_its_data(
    fedalign: Command, made: Made, questions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, asked = made(*questions), list[str]()

    def prompt_of(talk: Talk, row: Any, say: Any = None) -> str:
        asked.append(talk._example(Row(row, "prompt", 1)).prompt)
        return "yes"

    monkeypatch.setattr(Talk, "answer", prompt_of)

    def answered(name: str, text: str, *settings: str) -> list[dict[str, Any]]:
        (tmp_path / name).write_bytes(text.encode("cp1250"))
        given = [word for setting in settings for word in ("--set", setting)]
        code, out, errors = fedalign("generate", str(run), "--prompts", str(tmp_path / name), *given)
        assert code == 0, errors
        assert "Windows-1252" not in out + errors
        return [json.loads(line) for line in out.splitlines()]

    words = "Łódź; źle | dobrze"
    cell = f'id|prompt\n1|"{words}"\n'
    (line,) = answered("a.csv", cell, "data.encoding=cp1250", "data.delimiter=|")
    assert line == {"id": "1", "prompt": words, "generated": "yes"}
    (line,) = answered("a.txt", words, "data.encoding=cp1250")
    assert line["prompt"] == words
    own = '{encoding = "cp1250", delimiter = "|", columns = {prompt = "pytanie"}, template = "Q: {pytanie}"}'
    files = f'data.files={{"b.csv" = {own}}}'
    (line,) = answered("b.csv", cell.replace("prompt", "pytanie"), files)
    assert line == {"id": "1", "pytanie": words, "generated": "yes"}  # each row as it is
    assert [words in prompt for prompt in asked] == [True, True, True]
    assert asked[-1] == f"Q: {words}"
    code, _, errors = fedalign(
        "generate", str(run), "--prompts", str(tmp_path / "a.csv"), "--set", "data.encoding=ascii"
    )
    assert (code, "a.csv" in errors, "Traceback" in errors) == (2, True, False)


def test_exact_matches_are_scored_where_answers_are_generated(
    fedalign: Command, made: Made, questions: list[str]
) -> None:
    argv = ["evaluate", str(made(*questions)), "--alone", "--json", "--set", "evaluation.generate=true"]
    code, out, errors = fedalign(*argv, "--set", "evaluation.max_new_tokens=4")
    assert code == 0, errors
    scores = json.loads(out)["tuned"]
    shares = [one["given"] == one["expected"] for one in scores["answered"]]
    assert scores["examples"] == 15
    assert scores["accuracy"] >= sum(shares) / 15
    assert scores["confusion"] is None


def test_a_chat_remembers_what_was_said(
    made: Made, tmp_path: Path, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": "user", "content": "rain falls"}, {"role": "assistant", "content": "weather"}]
    lines: list[Any] = [{"messages": turns}] * 24
    write_jsonl(tmp_path / "train.jsonl", lines)
    model = tmp_path / "model"
    model.mkdir()
    for file in olmoe.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "chat_template.jinja").write_text(CHATML)
    run = tmp_path / "run"
    data = [f"data.train={tmp_path / 'train.jsonl'}", f"model.path={model}", "data.kind=chat"]
    start(run, [], *data, "clients.partition=iid", "clients.count=2", "run.rounds=1", "statistics.min_tokens=4")
    talk = Talk(load(Source(str(run))), Sampling(most=3))
    heard: list[str] = []
    answer = talk.answer({talk.role: "rain falls"}, heard.append)
    assert "".join(heard).strip() == answer
    talk.remember("rain falls", answer)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    asked: list[str] = []
    monkeypatch.setattr(talk, "_generate", lambda ids, say: asked.append(talk.bench.tokenizer.decode(ids)))
    talk.answer({talk.role: "wind blows"})
    assert asked[0].count("rain falls") == 1
    assert asked[0].rstrip().endswith("assistant")
    talk.remember("wind blows", "")  # many templates refuse an answer in which nothing is said
    assert len(talk.messages) == 2


def test_a_typed_line_is_no_chat_whatever_the_column_is_called(
    made: Made, tmp_path: Path, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(olmoe, model)
    (model / "chat_template.jinja").write_text(CHATML)
    overrides = ["data.kind=chat", "data.columns.messages=text"]
    talk = Talk(load(Source(str(model), settings=overrides)), Sampling(most=3))
    asked: list[str] = []
    monkeypatch.setattr(talk, "_generate", lambda ids, say: asked.append(talk.bench.tokenizer.decode(ids)))
    talk.answer({talk.role: "rain falls"})
    talk.answer({talk.role: [{"role": "user", "content": "rain falls"}]})
    assert asked[0] == asked[1]
    assert "rain falls" in asked[0]


def test_lines_are_answered_as_they_are_typed(fedalign: Command, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["rain falls in town", "", "/new", "the dog runs"])

    def next_line(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    code, out, errors = fedalign("chat", str(made()))
    assert code == 0, errors
    assert sum(name in line for line in out.splitlines() for name in SUBJECTS) == 6


def test_what_is_no_text_is_left_out_and_the_talk_goes_on(
    fedalign: Command, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nthe dog runs\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", sent)
    code, out, errors = fedalign("chat", str(made()))
    assert code == 0, errors
    assert "That was no UTF-8" in errors
    assert sum(name in line for line in out.splitlines() for name in SUBJECTS) == 3


def test_a_closed_input_ends_the_talk(fedalign: Command, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert fedalign("chat", str(made()))[0] == 0


def test_the_model_in_a_run_is_of_the_run(fedalign: Command, made: Made, settings: list[str]) -> None:
    run = made("tuning.kind=lora", "tuning.rank=3", 'tuning.targets=["attention"]')
    config = configured(Source(str(run / "model")))
    assert config.data.labels == configured(Source(str(run))).data.labels
    assert config.tuning.rank == 3
    code, _, errors = fedalign("evaluate", str(run / "model"))
    assert code == 0, errors


def test_a_base_that_has_moved_can_be_named(
    fedalign: Command, settings: list[str], olmoe: Path, tmp_path: Path
) -> None:
    base, run, model = (tmp_path / name for name in ("base", "run", "model"))
    shutil.copytree(olmoe, base)
    start(run, settings, "run.rounds=1", "tuning.kind=lora", f"model.path={base}")
    export(Wanted(run, model, base=str(base)), lambda _: None)
    data = next(one.partition("=")[2] for one in settings if one.startswith("data.test="))
    _, told, _ = fedalign("evaluate", str(run), "--json")
    base.rename(tmp_path / "moved")
    for place in (run, model):
        argv = ["evaluate", str(place), "--data", data, *(["--alone"] if place == run else [])]
        code, _, errors = fedalign(*argv)
        assert code == 2
        assert "The adapter needs its base: say where, with --set model.path=BASE." in errors
        code, out, errors = fedalign(*argv, "--json", "--set", f"model.path={tmp_path / 'moved'}")
        assert code == 0, errors
        assert json.loads(out)["tuned"]["loss"] == pytest.approx(json.loads(told)["tuned"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chat", "x", "--best", "--start"], "--best and --start: the best round, or what the run started from?"),
        (["chat", "x", "--temperature", "nan"], "--temperature nan: must be 0, or from 0.001 to 100."),
        (["chat", "x", "--temperature", "1e-320"], "must be 0, or from 0.001 to 100."),
        (["generate", "x", "--prompts", "no.txt", "--temperature", "inf"], "--temperature inf: must be 0, or from"),
        (["chat", "no-such-folder"], "no-such-folder"),
        (["evaluate", "no-such/place/at/all"], "no-such/place/at/all"),
        (["generate", "x", "--prompts", "no.txt"], "holds no prompt, or is not there"),
        (["generate", "x", "--prompts", "no.jsonl"], "no.jsonl"),
    ],
)
def test_what_is_not_there_is_one_line(fedalign: Command, argv: list[str], said: str) -> None:
    code, _, errors = fedalign(*argv)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors


def test_an_exported_classifier_stops_after_its_label(settings: list[str], tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "model"
    start(run, settings, "clients.partition=iid", "run.rounds=4")
    export(Wanted(run, place), lambda _: None)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    said = []
    for row in rows()[::8]:
        ids = tokenizer(f"{row['text']}\nLabel:", return_tensors="pt").input_ids
        new = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        assert int(new[-1]) == tokenizer.eos_token_id
        said.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert set(said) <= set(SUBJECTS)


def test_answers_are_kept_as_they_come(
    fedalign: Command, made: Made, questions: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to, part = made(*questions), tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{words} falls"} for words in ("rain", "snow", "the dog")])
    argv = ["generate", str(run), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "4", "--to"]
    assert fedalign(*argv, str(tmp_path / "whole.jsonl"))[0] == 0
    asked, answer = list[Any](), Talk.answer

    def answer_two(talk: Talk, row: Any, say: Any = None) -> str:
        asked.append(row)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return answer(talk, row, say)

    monkeypatch.setattr(Talk, "answer", answer_two)
    code, _, errors = fedalign(*argv, str(to))
    assert (code, to.exists(), len(part.read_text().splitlines())) == (130, False, 1 + 2)
    assert "2 of 3 answers are kept; go on with --resume" in errors
    code, _, errors = fedalign(*argv, str(to))
    assert (code, "Go on with --resume, or remove it" in errors) == (2, True)
    with part.open("a") as file:
        file.write('{"prompt": "the dog fa')  # a kill in the middle of a line
    code, _, errors = fedalign(*argv, str(to), "--resume", "--max-new-tokens", "5")
    assert (code, "are of another configuration" in errors) == (2, True)
    code, _, errors = fedalign(*argv, str(to), "--resume", "--start")
    assert (code, "are of another model" in errors) == (2, True)
    code, out, errors = fedalign(*argv, str(to), "--resume")
    assert code == 0, errors
    assert "2 of 3 answers were there already" in out
    assert (len(asked), part.exists()) == (4, False)
    assert to.read_text() == (tmp_path / "whole.jsonl").read_text()
    code, _, errors = fedalign(*argv, str(to), "--resume")
    assert (code, "is there already" in errors) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "whole.jsonl", "prompts.jsonl"}


def test_a_run_that_answers_nothing_leaves_nothing(
    fedalign: Command, made: Made, questions: list[str], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"question": "rain falls"}])
    argv = ["generate", str(made(*questions)), "--prompts", str(tmp_path / "prompts.jsonl"), "--to"]
    code, _, errors = fedalign(*argv, str(tmp_path / "out.jsonl"))
    assert (code, "no column 'prompt'" in errors) == (2, True)
    (tmp_path / "other.jsonl.part").write_text("my notes\n")
    code, _, errors = fedalign(*argv, str(tmp_path / "other.jsonl"), "--resume")
    assert (code, "was not written by us" in errors) == (2, True)
    assert {path.name for path in tmp_path.iterdir()} == {"other.jsonl.part", "prompts.jsonl"}


TASK = """\
task: subjects
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nLabel:"
doc_to_choice: [animals, food, weather]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.mark.parametrize("more", [(), ("tuning.kind=lora",)])
def test_a_task_of_the_harness_scores_as_the_run_did(
    fedalign: Command, made: Made, texts: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = made(*more)
    (tmp_path / "subjects.yaml").write_text(TASK.format(data=texts / "test.jsonl", cache=tmp_path / "cache"))
    argv = ["evaluate", str(run), "--harness", "subjects", "--tasks-in", str(tmp_path)]
    code, out, errors = fedalign(*argv, "--json")
    assert code == 0, errors
    found = {name: results["subjects"]["acc,none"] for name, results in json.loads(out).items()}
    lines = history(run)
    assert found == {"start": lines[0]["accuracy"], "tuned": lines[-1]["accuracy"]}
    code, out, errors = fedalign(*argv, "--alone", "--limit", "5")
    assert code == 0, errors
    assert "subjects, acc" in out


def test_a_group_of_tasks_has_its_own_score(fedalign: Command, made: Made, texts: Path, tmp_path: Path) -> None:
    task = TASK.format(data=texts / "test.jsonl", cache=tmp_path / "cache")
    group = (
        "group: all_of_them\ntask: [subjects, again]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    for name, text in (("subjects", task), ("again", task.replace("subjects", "again")), ("all", group)):
        (tmp_path / f"{name}.yaml").write_text(text)
    argv = ["evaluate", str(made()), "--harness", "all_of_them", "--tasks-in", str(tmp_path), "--json"]
    code, out, errors = fedalign(*argv)
    assert code == 0, errors
    for results in json.loads(out).values():
        scores = [results[name]["acc,none"] for name in ("all_of_them", "subjects", "again")]
        assert scores[0] == pytest.approx(scores[1]) == scores[2]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--harness", "no_such_task"], "'no_such_task': unknown among the"),
        (["--harness", "broken", "--tasks-in", "."], "broken: cannot be loaded"),
        (["--harness", "x", "--tasks-in", "nowhere"], "'nowhere': is no folder"),
        (["--harness", "x", "--data", "y.jsonl"], "not with --harness"),
        (["--limit", "3"], "--limit: goes with --harness"),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(
    fedalign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.yaml").write_text(TASK.format(data="no.jsonl", cache="cache").replace("subjects", "broken"))
    code, _, errors = fedalign("evaluate", "runs/x", *argv)
    assert (code, said in errors, "Traceback" in errors) == (2, True, False)


def test_without_the_harness_a_line_says_how_to_get_it(fedalign: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedalign.inference.harness.find_spec", lambda name: None)
    code, _, errors = fedalign("evaluate", "runs/x", "--harness", "arc_easy")
    assert (code, "pip install 'fedalign-moe[harness]'" in errors) == (2, True)
