"""Checks of options and configuration files before torch is imported: mistakes are named, the rest is left alone."""

import os
from pathlib import Path

import pytest

from lightning_mvar.cli import run
from lightning_mvar.cli.checks import check_options
from lightning_mvar.errors import InputError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample --ckpt_path C --per-class 3", "sample has no option --per-class; did you mean --per_class?"),
        ("sample --ckpt_path C --guidence=1", "sample has no option --guidence; did you mean --guidance?"),
        ("fit --traner.max_steps 3", "fit has no option --traner.max_steps; did you mean --trainer.max_steps?"),
        ("fit --trainer.callback+=X", "fit has no option --trainer.callback; did you mean --trainer.callbacks?"),
        ("fit --model.network.dept 3", "fit has no option --model.network.dept; did you mean --model.network.depth?"),
        ("fit --model.network.depth many", "--model.network.depth many is not a number"),
        ("fit --trainer.max_steps 3.5", "--trainer.max_steps 3.5 is not an integer"),
        ("fit --model.netwrk.depth 3", "fit has no option --model.netwrk; did you mean --model.network?"),
        ("shards verify D --tokeniser T", "shards verify has no option --tokeniser; did you mean --tokenizer?"),
        ("shards verfy tokens", "shards has no subcommand 'verfy'; did you mean verify?"),
        ("sample --ckpt_path C --guidance [a]", "--guidance [a] is not a number"),
        ("sample --ckpt_path C --top_k many", "--top_k many is not a number"),
        ("sample --ckpt_path C --keep=half", "--keep half is not a number"),
        ("sample --ckpt_path C --weights emma", "--weights emma is unknown; did you mean ema?"),
        ("sample --ckpt_path C --graphs maybe", "--graphs maybe is unknown; use true, false"),
        ("sample C --ckpt_path=D", "C already sets --ckpt_path of sample: drop --ckpt_path=D or C"),
        (
            "sample --out o var-d16",
            "sample needs MODEL as its first argument (or --ckpt_path); "
            "`lightning-mvar sample --help` lists the options",
        ),
        (
            "evaluate s.npz --reference x",
            "evaluate needs --samples (s.npz was read as MODEL); `lightning-mvar evaluate --help` lists the options",
        ),
        ("new --images p", "new needs FOLDER; `lightning-mvar new --help` lists the options"),
        ("merge", "merge needs NETWORKS, --out; `lightning-mvar merge --help` lists the options"),
        ("fit --data.val=D", "fit needs --data.train; `lightning-mvar fit --help` lists the options"),
        (
            "fit --config nowhere.yaml",
            "--config nowhere.yaml does not exist; `lightning-mvar configs` lists the files in the package",
        ),
        ("shards", "shards needs a subcommand; it has verify, info, decode"),
        ("merge A --zzz", "merge has no option --zzz; `lightning-mvar merge --help` lists the options"),
    ],
)
def test_mistakes_are_named_with_their_remedy(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 1
    assert capsys.readouterr().err == f"lightning-mvar: error: {message}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer:\n  max_stes: 3\n",
            "line 2: fit has no option --trainer.max_stes; did you mean --trainer.max_steps?",
        ),
        ("model: {network: {depth: many}}", "line 1: --model.network.depth many is not a number"),
        (
            "model:\n\n  network: {scan_order: colum}",
            "line 3: --model.network.scan_order colum is unknown; did you mean",
        ),
        ("trainer.max_steps: three", "line 1: --trainer.max_steps three is not a number"),
        ("model: {network: {shedule: {side_lengths: [1]}}}", "did you mean --model.network.schedule?"),
        ("trainer: {max_steps: 1", "is not valid YAML"),
        ("trainer:\n  {max_steps: {{ steps }}}", "line 2: a key is a mapping: put quotes around text that starts with"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        check_options("fit", "--config", str(file))
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_mistakes_in_a_file_of_any_command_are_named_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "tokenize.yaml"
    for text, message in (
        ("images: a\nmagrin: 1.0", f"{file}, line 2: tokenize has no option --magrin; did you mean --margin?"),
        ("images: a\nviews 2\nsplit: true", "while scanning a simple key in line 2, column 1: views 2 ^ could not"),
    ):
        file.write_text(text)
        with pytest.raises(InputError) as error:
            check_options("tokenize", "--config", str(file))
        assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "model: {network: {drop_path: ~, window: null, schedule: {side_lengths: [1, 2]}}, compile: on}",
        "model: {objective: {class_path: a.Class, init_args: {depth: many}}, network: network.yaml}",
        "$schema: fit.json\ntrainer: {callbacks+: [a.yaml], max_steps: '${model.steps}', precision: 16}",
        "<<: &base {tf32: true}\ntrainer: {logger: {class_path: CSVLogger, dict_kwargs: {x: 1}}, max_time: null}",
    ],
)
def test_what_the_parser_takes_in_a_file_is_not_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    check_options("fit", "--config", str(tmp_path / "run.yaml"))


def test_a_pipe_is_left_to_the_parser(tmp_path: Path) -> None:
    """It can be read only once: `--config <(...)`. Opening this one would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    check_options("fit", "--config", str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    "line",
    [
        "sample --config x:y/sample.yaml",
        "fit --config {data:{train:a,val:b}}",
        "fit -cnope.yaml",
        "merge --weights raw A B --out o",
        "merge --out o -- A B",
        "new --images p q",
        "shards verify --folder D",
    ],
)
def test_what_may_be_given_elsewhere_is_not_asked_for(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x:y").mkdir()
    Path("x:y/sample.yaml").write_text("ckpt_path: C")
    check_options(*line.split())


@pytest.mark.parametrize(
    "value", ["--num_workers 1_000", "--num_workers -1", "--batch_size 1e3", "--on_corrupt skip", "--device null", ""]
)
def test_what_the_parser_takes_is_not_refused(value: str) -> None:
    check_options("reconstruct", "--tokenizer", "T", "--images", "I", *value.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("InceptionV4", "--extractor InceptionV4: no such class; did you mean InceptionV3?"),
        ("lightning_mvar.metrics.InceptionV4", "--extractor InceptionV4: no such class; did you mean Incepti"),
        (
            "InceptionV3 --extractor.wieghts W",
            "--extractor InceptionV3: Option 'wieghts' is not accepted; did you mean weights?",
        ),
    ],
)
def test_mistakes_in_a_class_are_named(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reconstruct", "--tokenizer", ".", "--images", ".", "--extractor", *options.split()]) == 1
    assert capsys.readouterr().err.startswith(f"lightning-mvar: error: {message}")
