"""`merge` on the command line: which coefficients its options stand for, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_network

from lightning_mvar import Tokenizer
from lightning_mvar.checkpoints import save_folder
from lightning_mvar.cli import run


@pytest.fixture
def folders(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with the exported networks a, b and t."""
    monkeypatch.chdir(tmp_path)
    for name in "abt":
        save_folder(tmp_path / name, tokenizer, tiny_network(depth=1))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("a b --out out", {"a": 0.5, "b": 0.5}),
        ("--out out a b --coefficients 0.7 -0.3", {"a": 0.7, "b": -0.3}),
        ("a b --base t --coefficients 0.5 0.25 --out out", {"a": 0.5, "b": 0.25, "t": 0.25}),
        ("--base t a --away 0.5 --out out", {"a": -0.5, "t": 1.5}),
    ],
)
def test_each_form_is_a_linear_combination(
    folders: Path, options: str, expected: dict[str, float], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["merge", *options.split()]) == 0
    record = json.loads((folders / "out/config.json").read_text())["merged"]
    assert {term["path"]: term["coefficient"] for term in record} == pytest.approx(expected)
    assert "merged network and tokenizer in out" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("a b --coefficients 1 --out out", "--coefficients has 1 numbers for 2 networks; give one per network"),
        ("a --base t --out out", "--base needs --coefficients, one per network, or --away"),
        ("a b --base t --away 1 --out out", "--away goes with --base and one network"),
        ("a --away 1 --out out", "--away goes with --base and one network"),
        ("a --coefficients x --out out", "--coefficients x is not a number"),
        ("a --coefficients inf --out out", "Got value: inf"),
        ("a b --out b", "--out b would overwrite the input network 2 b"),
        ("a nowhere --out out", "nowhere does not exist"),
        ("--out out", "NETWORKS"),
        ("a torn --out out", "torn/network.safetensors is damaged or not a safetensors file"),
        ("a --coefficients -1e39 --out out", "its coefficients -1e+39 are too large"),
    ],
)
def test_mistakes_give_one_message(
    folders: Path, tokenizer: Tokenizer, options: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_folder(folders / "torn", tokenizer, tiny_network(depth=1))
    weights = folders / "torn/network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run(["merge", *options.split()]) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (folders / "out/config.json").exists()
