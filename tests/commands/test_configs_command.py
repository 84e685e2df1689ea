from pathlib import Path

import pytest

from lightning_mvar.cli import run

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_config_is_listed_with_the_first_sentence_of_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [f"configs/{path.relative_to(CONFIGS)}" for path in sorted(CONFIGS.rglob("*.yaml"))]
    assert [line.split()[0] for line in lines] == names
    assert all(len(line) <= 120 and len(line.split()) > 1 for line in lines)
    (line,) = (line for line in lines if "mixer/mvar" in line)
    assert line.split(maxsplit=1)[1] == "M-VAR: attention inside scales, Mamba-2 across scales"


def test_configs_are_copied_to_a_new_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "a/configs"
    assert run(["configs", "--copy", str(copy)]) == 0
    for path in CONFIGS.rglob("*.yaml"):
        assert (copy / path.relative_to(CONFIGS)).read_bytes() == path.read_bytes()
    assert run(["configs", "--copy", str(copy)]) == 1
    assert f"--copy {copy} is not empty: name a new folder" in capsys.readouterr().err
