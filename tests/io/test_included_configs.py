from pathlib import Path

from lightning_mvar.io.configs import PACKAGED, with_included

ROOT = Path(__file__).parents[2] / "configs"


def test_the_package_has_all_configs() -> None:
    """In a clone by a link, in a wheel by the package data of pyproject.toml."""
    ours, packaged = ({path.relative_to(root) for path in root.rglob("*.yaml")} for root in (ROOT, PACKAGED))
    assert ours == packaged


def test_a_config_comes_with_the_files_that_its_values_name() -> None:
    found = {path.resolve().relative_to(ROOT).as_posix() for path in with_included(ROOT / "experiment/digits.yaml")}
    assert found == {"experiment/digits.yaml", "base/logger.yaml", "base/callbacks/checkpoint.yaml"}
    assert with_included(ROOT / "mixer/var.yaml") == [ROOT / "mixer/var.yaml"]  # its header names others


def test_a_config_that_names_itself_comes_once(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"x: {other}.yaml\ny: {name}.yaml\n")
    assert with_included(tmp_path / "a.yaml") == [tmp_path / "a.yaml", tmp_path / "b.yaml"]
