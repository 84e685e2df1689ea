"""Help, suggestions and completion: read from the source of the commands, and equal to the options of their parsers."""

import subprocess
import sys
from importlib import import_module

import pytest
from jsonargparse import capture_parser

from lightning_mvar.cli import run
from lightning_mvar.cli.help import (
    COMMANDS,
    OF_ANY_PARSER,
    check_options,
    completion,
    signatures_of,
    with_network_option,
)

SCREEN = 60  # lines


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("validate", "test")])
def test_the_options_are_those_of_the_parser(name: str) -> None:
    parser = capture_parser(lambda: import_module(f"lightning_mvar.commands.{COMMANDS[name][0]}").main([name]))
    parsers = parser._subcommands_action._name_parser_map if parser._subcommands_action else {"": parser}
    signatures = signatures_of(name)
    assert signatures.keys() == parsers.keys()
    for subcommand, found in signatures.items():
        actions = {action.dest: action for action in parsers[subcommand]._actions}
        read = {option.name for option in found.options}
        sections = {option.split(".")[0] for option in read if "." in option}  # of the training commands
        parsed = {".".join(dest.split(".")[:2]) for dest in actions if not dest.endswith(".help")}
        assert read - OF_ANY_PARSER == parsed - sections - OF_ANY_PARSER
        positional = {dest for dest, action in actions.items() if not action.option_strings}
        assert {option.name for option in found.options if option.positional} == positional


def test_help_fits_on_a_screen_and_mistakes_are_named_before_torch_is_imported() -> None:
    lines = [
        "--version",
        "--help",
        "smaple",
        "sample --help",
        "evaluate --help",
        "fit --help",
        "sample --ckpt_path C --sed 1",
    ]
    code = (
        "import sys; from lightning_mvar.cli import run\n"
        f"for line in {lines}: print('<code>', run(line.split()))\n"
        "assert not {'torch', 'lightning', 'jsonargparse', 'numpy'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outputs = result.stdout.split("<code> ")
    assert [output.split("\n")[0] for output in outputs[1:]] == ["0", "0", "1", "0", "0", "0", "1"]
    for output in outputs[3:6]:  # each begins with the exit code of the line before
        assert len(output.splitlines()[1:]) <= SCREEN
    assert result.stderr.splitlines() == [
        "lightning-mvar: error: there is no command 'smaple'; did you mean sample?",
        "lightning-mvar: error: sample has no option --sed; did you mean --seed?",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample --ckpt_path C --per-class 3", "sample has no option --per-class; did you mean --per_class?"),
        ("sample --ckpt_path C --guidence=1", "sample has no option --guidence; did you mean --guidance?"),
        ("fit --traner.max_steps 3", "fit has no option --traner.max_steps; did you mean --trainer.max_steps?"),
        ("fit --trainer.callback+=X", "fit has no option --trainer.callback; did you mean --trainer.callbacks?"),
        ("fit --model.netwrk.depth 3", "fit has no option --model.netwrk; did you mean --model.network?"),
        ("shards verify D --tokeniser T", "shards verify has no option --tokeniser; did you mean --tokenizer?"),
        ("shards verfy tokens", "shards has no command 'verfy'; did you mean verify?"),
        ("sample --ckpt_path C --guidance [a]", "--guidance [a] is not a number"),
        ("sample --ckpt_path C --top_k many", "--top_k many is not a number"),
        ("sample --ckpt_path C --keep=half", "--keep half is not a number"),
        ("sample --ckpt_path C --weights emma", "--weights emma is unknown; did you mean ema?"),
        ("sample --ckpt_path C --graphs maybe", "--graphs maybe is unknown; use true, false"),
        ("sample C --ckpt_path=D", "sample C names the network already: drop --ckpt_path=D, or C"),
        ("merge A --zzz", "merge has no option --zzz; `lightning-mvar merge --help` lists the options"),
    ],
)
def test_mistakes_are_named_with_their_remedy(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 1
    assert capsys.readouterr().err == f"lightning-mvar: error: {message}\n"


@pytest.mark.parametrize(
    "value", ["--num_workers 1_000", "--num_workers -1", "--batch_size 1e3", "--on_corrupt skip", "--device null", ""]
)
def test_what_the_parser_takes_is_not_refused(value: str) -> None:
    check_options("reconstruct", *value.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("InceptionV4", "--extractor InceptionV4: there is no such class; did you mean InceptionV3?"),
        ("InceptionV3 --extractor.wieghts W", "--extractor InceptionV3: Option 'wieghts' is not accepted; `lightning-"),
    ],
)
def test_mistakes_in_a_class_are_named(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reconstruct", "--tokenizer", "T", "--images", "I", "--extractor", *options.split()]) == 1
    assert capsys.readouterr().err.startswith(f"lightning-mvar: error: {message}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sample var-d16 --out o", "sample --ckpt_path var-d16 --out o"),
        ("evaluate var-d16 --samples s", "evaluate --ckpt_path var-d16 --samples s"),
        ("sample --out o --ckpt_path var-d16", "sample --out o --ckpt_path var-d16"),
        ("merge A B --out o", "merge A B --out o"),
        ("shards verify D", "shards verify D"),
        ("fit", "fit"),
    ],
)
def test_the_first_word_of_a_command_is_the_network(line: str, expected: str) -> None:
    assert with_network_option(line.split()) == expected.split()


def test_help_shows_choices_defaults_and_positional_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "--help"]) == 0
    text = capsys.readouterr().out
    assert "lightning-mvar merge NETWORKS ... --out OUT [options]" in text
    assert "--weights {ema,raw}" in text
    assert "[ema]" in text


def test_completion_knows_commands_options_and_choices() -> None:
    pytest.importorskip("shtab")
    script = completion("bash")
    for word in ("train-tokenizer", "--guidance_off_from", "--trainer.gradient_clip_val", "bfloat16"):
        assert word in script


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["evaluate", "--help"]) == run(["--help_all"]) == 0
