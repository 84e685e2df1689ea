"""Help and completion: read from the source of the commands, and equal to the options of their parsers."""

import subprocess
import sys

import pytest
from jsonargparse import capture_parser

from lightning_mvar.cli import run, run_command
from lightning_mvar.cli.help import COMMANDS, PARSER_OPTIONS, completion, signatures_of, with_first_option

SCREEN = 60  # lines


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("validate", "test")])
def test_the_options_are_those_of_the_parser(name: str) -> None:
    parser = capture_parser(lambda: run_command([name]))
    parsers = parser._subcommands_action._name_parser_map if parser._subcommands_action else {"": parser}
    signatures = signatures_of(name)
    assert signatures.keys() == parsers.keys()
    for subcommand, found in signatures.items():
        actions = {action.dest: action for action in parsers[subcommand]._actions}
        read = {option.name for option in found.options}
        sections = {option.split(".")[0] for option in read if "." in option}  # of the training commands
        parsed = {".".join(dest.split(".")[:2]) for dest in actions if not dest.endswith(".help")} - {"print_shtab"}
        assert read - PARSER_OPTIONS == parsed - sections - PARSER_OPTIONS
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
        "lightning-mvar: error: unknown command 'smaple'; did you mean sample?",
        "lightning-mvar: error: sample has no option --sed; did you mean --seed?",
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sample var-d16 --out o", "sample --ckpt_path var-d16 --out o"),
        ("evaluate var-d16 --samples s", "evaluate --ckpt_path var-d16 --samples s"),
        ("sample --out o --ckpt_path var-d16", "sample --out o --ckpt_path var-d16"),
        ("merge A B --out o", "merge A B --out o"),
        ("shards verify D", "shards verify --folder D"),
        ("bench sample --versus var", "bench --what sample --versus var"),
        ("fit", "fit"),
    ],
)
def test_the_first_word_of_a_command_stands_for_an_option(line: str, expected: str) -> None:
    assert with_first_option(line.split()) == expected.split()


def test_help_shows_choices_defaults_and_positional_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "--help"]) == 0
    text = capsys.readouterr().out
    assert "lightning-mvar merge NETWORKS ... --out OUT [options]" in text
    assert "--weights {ema,raw}" in text
    assert "[ema]" in text


def test_completion_knows_commands_options_and_choices() -> None:
    pytest.importorskip("shtab")
    script = completion("bash")
    for word in (
        "train-tokenizer",
        "--guidance_off_from",
        "--trainer.gradient_clip_val",
        "--model.network.depth",
        "bfloat16",
    ):
        assert word in script


def test_help_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["evaluate", "--help"]) == run(["--help_all"]) == 0
