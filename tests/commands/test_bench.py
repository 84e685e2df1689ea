"""`bench` from its command line, with the smallest networks."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import write_images, write_token_shards

from lightning_mvar import Tokenizer
from lightning_mvar.bench import measure
from lightning_mvar.bench.subjects import Setting
from lightning_mvar.cli import run
from lightning_mvar.commands import bench
from lightning_mvar.commands.bench import measure_data
from lightning_mvar.data.images import crops
from lightning_mvar.models.costs import state_bytes

SMALL = ["--size", "d12", "--depth", "1", "--batch_size", "1", "--repeats", "1", "--device", "cpu"]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrows networks and tokenizers; those of the published width take seconds per image."""
    monkeypatch.setattr(bench, "Setting", partial(Setting, narrow=True))


@pytest.mark.usefixtures("narrow")
def test_sampling_is_compared_and_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sample.json"
    options = ["--versus", "mixer=var", "--profile", "true", "--json", str(file)]
    assert run(["bench", "sample", *SMALL, *options]) == 0
    mvar, var = json.loads(file.read_text())
    assert (mvar["mixer"], var["mixer"]) == ("mvar", "var")
    for record in (mvar, var):
        assert record["images_per_s"] * 680 == pytest.approx(record["tokens_per_s"])
        assert record["network_s_per_image"] + record["decoder_s_per_image"] < 1 / record["images_per_s"]
        assert record["flops_per_image"] == record["network_flops_per_image"] + record["decoder_flops_per_image"]
        rate = record["flops_per_image"] * record["images_per_s"]
        assert record["matmul_share"] == pytest.approx(rate / record["matmul_flops_per_s"])
        assert record["peak_memory_bytes"] > record["state_bytes_per_image"] > 0
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "scan" in printed
    assert "BlockCausalAttention" in printed


@pytest.mark.usefixtures("narrow")
def test_training_and_operations(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert run(["bench", "train", *SMALL, "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())
    assert record["images_per_s"] == pytest.approx(1 / record["step_s"])
    assert run(["bench", "op", *SMALL, "--json", str(file)]) == 0
    records = {record["op"]: record for record in json.loads(file.read_text())}
    assert records["block"]["share_of_block"] == 1
    assert records["scan"]["share_of_block"] == records["scan"]["seconds"] / records["block"]["seconds"]


@pytest.mark.usefixtures("narrow")
def test_drawing_a_scale_again_begins_with_the_state_before_it(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    assert run(["bench", "step", *SMALL, "--versus", "mixer=var,batch_size=2", "--json", str(file)]) == 0
    mvar, var = json.loads(file.read_text())
    assert mvar["tokens"] == var["tokens"] == 256
    assert var["state_bytes_per_image"] == 2 * 4 * (680 - 256) * 64  # keys and values of all scales but the last
    assert mvar["state_bytes_per_image"] == state_bytes(Setting("d12", depth=1, narrow=True).network, torch.float32)


def test_memory_of_all_resolutions(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert run(["bench", "memory", "--size", "d12", "--depth", "1", "--versus", "mixer=var", "--json", str(file)]) == 0
    state_bytes = {(r["mixer"], r["resolution"]): r["state_bytes_per_image"] for r in json.loads(file.read_text())}
    assert len({state_bytes["mvar", side] for side in (256, 512, 1024)}) == 1
    assert state_bytes["var", 1024] == 2 * 4 * 9451 * 768


@pytest.mark.usefixtures("narrow")
def test_launches_are_counted_by_part(tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    assert run(["bench", "launches", *SMALL, "--json", str(file)]) == 0
    records = {(record["run"], record["part"]): record for record in json.loads(file.read_text())}
    for name, steps in (("sample", 10), ("train", 1)):
        parts = {part: record for (of, part), record in records.items() if of == name}
        total, blocks = parts.pop("total"), parts.pop("all blocks")
        assert total["launches"] == sum(record["launches"] for record in parts.values())
        assert total["launches"] > blocks["launches"] == blocks["launches_per_block_and_scale"] * steps
        assert parts["MLP"]["launches"] == 3 * steps  # depth 1
    assert run(["bench", "launches", *SMALL, "--compile", "true"]) == 1


@pytest.mark.usefixtures("narrow")
def test_tokenizing_is_measured_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(seconds=0)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))

    def takes(seconds: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            clock.seconds += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(crops, "decode_image", takes(1, crops.decode_image))
    monkeypatch.setattr(Tokenizer, "features", takes(10, Tokenizer.features))
    write_images(tmp_path / "images", per_class=1)
    file = tmp_path / "tokenize.json"
    command = ["bench", "tokenize", "--images", str(tmp_path / "images"), "--batch_size", "2", "--repeats", "1"]
    assert run([*command, "--num_workers", "0", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())
    assert (record["images"], record["resolution"]) == (3, 256)
    seconds = [3 / record[f"{part}_images_per_s"] for part in ("decode", "encode", "pipeline")]
    assert seconds == pytest.approx([3, 20, 23])  # three images, two batches
    assert run(["bench", "sample", "--images", str(tmp_path / "images")]) == 1


def test_reading_counts_every_sample() -> None:
    (record,) = measure_data([Setting(batch_size=100)], num_workers=1, repeats=1, world_size=1, samples=1000)
    assert record["samples"] == 1000
    (rank,) = measure_data([Setting(batch_size=100)], num_workers=0, repeats=1, world_size=3, samples=1000)
    assert rank["samples"] == 300
    assert rank["global_samples_per_s"] == pytest.approx(3 * rank["samples_per_s"])
    assert 0 < record["first_batch_s"] <= 1000 / record["samples_per_s"]


def test_reading_of_local_and_remote_shards_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_token_shards(tmp_path / "tokens", "abc", [20, 20, 7])
    for place in ("tokens", "pipe:cat tokens/{}"):
        assert run(["bench", "data", "--shards", place, "--num_workers", "0", "--json", "data.json"]) == 0
        (record,) = json.loads((tmp_path / "data.json").read_text())
        assert (record["tokens"], record["samples"]) == (30, 44)
        assert min(record["samples_per_s"], record["first_pass_samples_per_s"]) > 0
    assert len(list((tmp_path / "outputs/shard_cache").glob("*.tar"))) == 3
    assert run(["bench", "data", "--shards", "tokens", "--batch_size", "100"]) == 1
    assert "(of `bench data`, --batch_size or --world_size)" in capfd.readouterr().err


def test_mistakes_are_reported_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    for options, message in [
        (["sample", "--versus", "mixer=mamba"], "choose one of mvar, var"),
        (["sample", "--mixer", "mamba2+mamba3"], "'mamba3' by mixers joined with +: scale_attention"),
        (["sample", "--versus", "width=3"], "'width=3' is not NAME=VALUE"),
        (["sample", "--versus", "narrow=true"], "'narrow=true' is not NAME=VALUE"),
        (["sample", "--versus", "compile=true"], "--compile, also in --versus, works only with `bench train`"),
        (["sample", "--size", "d13"], "'d13' is unknown; choose one of"),
        (["memory", "--resolution", "300"], "300"),
        (["train", "--profile", "true"], "--profile works only with"),
        (["train", "--repeats", "0"], "--repeats"),
        (["step", "--mixer", "ar_raster"], "mixer=ar_raster predicts single tokens"),
        (["train", "--world_size", "2"], "--world_size works only with `bench data`"),
        (["train", "--shards", "tokens"], "--shards works only with `bench data`"),
        (["nothing"], "nothing"),
    ]:
        assert run(["bench", *options]) == 1
        error = capfd.readouterr().err
        assert message in error
        assert "Traceback" not in error
