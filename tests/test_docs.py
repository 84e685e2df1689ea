"""The documentation: its examples run, its commands parse, and files, tests and functions that it names exist."""

from __future__ import annotations

import ast
import importlib
import math
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from zipfile import ZipFile

import pytest
import torch
from conftest import CLASSES, SCHEDULE, Projection, random_tokens, tiny_network, write_images
from test_layering import LAYERS
from torch.nn import functional as F

from lightning_mvar import cli
from lightning_mvar.cli import signatures
from lightning_mvar.cli.checks import check_options
from lightning_mvar.cli.help import with_first_option
from lightning_mvar.commands.sweep import plan_cells
from lightning_mvar.data.images.crops import DecodedImages
from lightning_mvar.data.images.files import FolderImages
from lightning_mvar.data.images.loader import ImageLoader, ShuffledImages
from lightning_mvar.io import known_files
from lightning_mvar.io.hub import NETWORKS, SHA256, TOKENIZERS
from lightning_mvar.io.known_files import ADM_REFERENCES, DINOV2_VITL14, INCEPTION, VGG16, KnownFile
from lightning_mvar.metrics import evaluator
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Features
from lightning_mvar.models import config
from lightning_mvar.sweeps.sweep_file import read_sweep

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs/architecture.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"(?<![\w./{}*-])(?:configs|docs|lightning_mvar|notebooks|tests)/[\w./-]*\.(?:py|yaml|md|ipynb|png)\b"
)
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
DOTTED_NAME = re.compile(r"`([a-z_]+(?:\.\w+)+)`")
COMMAND = re.compile(r"^(?:#?  +|srun )[^`\n]*?lightning-mvar (.+)$", re.MULTILINE)  # in blocks and configs' headers
OF_A_PROJECT = re.compile(r"--config [\w-]+\.yaml")  # file of a folder that `new` writes


@pytest.fixture(autouse=True)
def restored_registries() -> Iterator[None]:
    """Removes the entries that examples add."""
    registries = (config.MIXERS, evaluator.FULL_NAMES, cli.COMMANDS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def example_source(name: str) -> str:
    """Returns an example of docs/architecture.md."""
    blocks = [block for block in FENCE.findall(ARCHITECTURE.read_text()) if f"# example: {name}\n" in block]
    assert len(blocks) == 1, name
    return blocks[0].removeprefix("```python\n").removesuffix("```")


def example(name: str) -> ModuleType:
    """Runs an example as a module."""
    module = ModuleType(f"example_{name.replace(' ', '_')}")
    exec(compile(example_source(name), f"example: {name}", "exec"), vars(module))
    return module


def test_every_example_is_tested() -> None:
    marked = re.findall(r"^# example: (.+)$", ARCHITECTURE.read_text(), re.MULTILINE)
    assert marked == ["mixer", "score", "data source", "command"]
    assert ARCHITECTURE.read_text().count("```python") == len(marked)


def test_the_example_mixer_trains_and_takes_one_scale_at_a_time() -> None:
    example("mixer")
    network = tiny_network(mixers=("scale_attention", "scale_mean"))
    generator = torch.Generator().manual_seed(0)
    labels, tokens = torch.tensor([0, 3, 10]), random_tokens(3)
    inputs = torch.randn(3, SCHEDULE.num_tokens - 1, 8, generator=generator)
    with torch.no_grad():
        full, state, parts = network(labels, inputs), network.init_state(labels), []
        for part in (None, *inputs.split(SCHEDULE.lengths[1:], dim=1)):
            logits, state = network.step(part, state)
            parts.append(logits)
        assert full.abs().max() > 1  # a comparison of zeros would prove nothing
        assert (torch.cat(parts, dim=1) - full).abs().max() < 1e-4
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=1e-2), []
    for _ in range(10):
        loss = F.cross_entropy(network(labels, inputs).flatten(0, 1), tokens.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert network.blocks[0].mixers[1].proj.weight.grad.abs().max() > 0
    assert losses[-1] < losses[0] / 2


def test_the_example_score_equals_a_plain_loop_over_pairs() -> None:
    gaussian_distance = example("score").gaussian_distance
    torch.manual_seed(0)
    extractor, sets = Projection(), [torch.rand(12, 3, 8, 8), torch.rand(9, 3, 8, 8) / 4]
    measured = [Features(extractor, len(images), 100) for images in sets]
    for features, images in zip(measured, sets, strict=True):
        features.update(images, torch.arange(len(images)))
    summary = measured[0].compute()
    scores = Scores(extractor, summary, len(sets[1]))
    scores.update(sets[1], torch.arange(len(sets[1])))
    real, generated = summary.features, scores.features.compute().features

    def mean(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(math.exp(-float((x - y).double().square().sum()) / 200) for x in a for y in b) / len(a) / len(b)

    expected = 1000 * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))
    assert gaussian_distance(real, generated) == pytest.approx(expected, rel=1e-6)
    assert gaussian_distance(real, generated) > 2 * gaussian_distance(real[:6], real[6:])


def test_the_example_data_source_gives_the_images_of_the_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    with ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(tmp_path / "images"))
        archive.writestr("about.txt", "not an image")
    zipped = DecodedImages(example("data source").ZipImages(tmp_path / "images.zip"), (8, 8), "raise")
    folder = DecodedImages(FolderImages(tmp_path / "images", None), (8, 8), "raise")
    assert zipped.class_names == CLASSES
    assert zipped.listing == folder.listing
    batches = [list(ImageLoader(ShuffledImages(source, 6, 0, "random", 0, 1), 0, False)) for source in (zipped, folder)]
    assert [len(epoch) for epoch in batches] == [3, 3]
    for ours, theirs in zip(*batches, strict=True):
        assert ours.keys == theirs.keys
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_the_example_command_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, read = "lightning_mvar.commands.scales", signatures.tree_of
    tree = ast.parse(example_source("command"))
    monkeypatch.setattr(signatures, "tree_of", lambda name: tree if name == module else read(name))
    monkeypatch.setitem(sys.modules, module, example("command"))
    assert cli.run(["scales", "--resolution", "512"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["side", "tokens", "first_token"]
    assert rows[-1] == ["32", "1024", "1216"]
    assert cli.run(["scales", "--resolution", "300"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.run(["--help"]) == 0
    assert "print the token maps of a published schedule" in capsys.readouterr().out


def test_the_table_of_layers_equals_that_of_the_layering_test() -> None:
    section = ARCHITECTURE.read_text().split("## Layers")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    assert [re.findall(r"`(\w+)`", cell) for cell in first_cells] == LAYERS


def test_the_named_invariant_tests_exist() -> None:
    named = NAMED_TEST.findall(ARCHITECTURE.read_text())
    assert len(named) > 15
    for path, name in named:
        functions = {
            node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"


def test_the_functions_of_the_walks_exist() -> None:
    section = ARCHITECTURE.read_text().split("## Four walks")[1].split("\n## ")[0]
    names = set(DOTTED_NAME.findall(section))
    assert len(names) > 40
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a dotted name within the package is a module or leads to an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(["lightning_mvar", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def test_the_table_of_files_is_that_of_the_code() -> None:
    text = (ROOT / "docs/weights.md").read_text()
    rows = re.findall(
        r"^\| (?:`(?:--\w+ )?([^`]+)`|LPIPS) \| <(.+?)> \| (.*?) ?\| (?:`(\w+)` )?\|$", text, re.MULTILINE
    )
    files = {"InceptionV3": INCEPTION, "DINOv2": DINOV2_VITL14, "": VGG16} | ADM_REFERENCES
    expected = [
        (name, file.url, "" if file.size is None else f"{file.size:,}", file.sha256 or "")
        for name, file in files.items()
    ]
    for name, place in (NETWORKS | TOKENIZERS).items():
        repository, file, revision = re.split("[:@]", place)
        url = f"https://huggingface.co/{repository}/resolve/{revision}/{file}"
        expected.append((name, url, "", SHA256.get(place, "")))
    assert sorted(rows) == sorted(expected)
    assert {file for file in vars(known_files).values() if isinstance(file, KnownFile)} <= set(files.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link.partition("#")[0] for link in LINK.findall(FENCE.sub("", text)) if not re.match(r"\w+:", link)]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    assert missing == []


def commands_of(file: Path) -> list[str]:
    """Returns the commands in the blocks of a page or the header of a config, with optional parts included."""
    text = re.sub(r"\\\n#?", " ", file.read_text())
    lines = [line for line in COMMAND.findall(text) if "..." not in line and not OF_A_PROJECT.search(line)]
    return [re.sub(r"\[(--[^]]+)\]", r"\1", re.sub(r"\$\w+", "1", line)) for line in lines]


def test_the_commands_of_the_documentation_are_found() -> None:
    assert sum(len(commands_of(file)) for file in PAGES + CONFIGS) > 200


@pytest.mark.parametrize("file", PAGES + CONFIGS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_options_and_networks_of_commands_exist(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands_of(file):
        words = with_first_option(shlex.split(line, comments=True))
        check_options(*words)
        models = [value for option, value in pairwise(words) if option == "--ckpt_path"]
        assert all(model in NETWORKS or "/" in model for model in models), line


def test_the_example_sweeps_plan_their_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/sweeps.md").read_text(), re.MULTILINE | re.DOTALL)
    for text, cells in zip(examples, (15, 18), strict=True):
        (tmp_path / "example.yaml").write_text(text)
        assert len(plan_cells(read_sweep(tmp_path / "example.yaml"), tmp_path)) == cells
