"""Records of speed and memory, computed from times that are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mvar.bench import networks
from lightning_mvar.bench.measure import Run
from lightning_mvar.bench.networks import measure_operations, measure_sampling, measure_training
from lightning_mvar.bench.subjects import Setting
from lightning_mvar.sampling.costs import SamplingCosts

CPU = torch.device("cpu")
SETTING = Setting("d12", batch_size=2, depth=1, narrow=True)
MATMUL = 4e9  # FLOPs of the matrix product that rates are divided by
FLOPS = {"forward": 10**9, "decoder": 10**8}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs nothing: of n runs, the first takes 1, 2 and 99 seconds, and the n-th n times as long."""
    monkeypatch.setattr(
        networks, "time_interleaved", lambda runs, *_: [[i, 2 * i, 99 * i] for i in range(1, len(runs) + 1)]
    )
    monkeypatch.setattr(networks, "flops_per_image", lambda network, tokenizer: FLOPS)
    costs = SamplingCosts(flops_per_sampled_image=10**9, token_steps_per_image=1360)
    monkeypatch.setattr(networks, "sampling_costs", lambda sampling, network: costs)
    monkeypatch.setattr(networks, "peak_memory", lambda run, device: 10**9)
    monkeypatch.setattr(networks, "large_matmul", lambda dtype, device: (lambda: None, MATMUL))


def test_a_training_step_costs_three_passes_and_is_divided_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[nn.Module, dict[str, object]]] = []
    monkeypatch.setattr(networks, "configure_block", lambda block, **options: compiled.append((block, options)))
    compile_two = Setting("d12", batch_size=1, depth=2, narrow=True, compile=True)
    first, second = measure_training([SETTING, compile_two], CPU, 3)
    assert (first["step_s"], first["images_per_s"], first["tokens_per_s"]) == (2, 1, 680)
    assert first["flops_per_image"] == 3 * 10**9
    assert first["matmul_flops_per_s"] == MATMUL / 6  # the third to be timed
    assert first["matmul_share"] == pytest.approx(3e9 / (MATMUL / 6))
    assert (second["step_s"], second["images_per_s"]) == (4, 0.25)
    assert [options for _, options in compiled] == [{"compile": True, "checkpointing": "none"}] * 2  # of `second`


def test_operations_are_shares_of_the_block() -> None:
    records = {record["op"]: record for record in measure_operations(SETTING, CPU, 3)}
    assert [record["seconds"] for record in records.values()] == [2 * i for i in range(1, len(records) + 1)]
    assert records["mlp"]["share_of_block"] == 2
    assert records["mamba2, state carried"]["of"] == "sampling"
    assert "share_of_block" not in records["mamba2, state carried"]


def test_sampling_is_divided_by_the_batch_and_parts_are_medians_of_the_measured_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_all(runs: list[Run], repeats: int, device: torch.device) -> list[list[float]]:
        for _ in range(repeats + 1):
            runs[0]()
        return [[4.0] * repeats, [1.0] * repeats]

    seconds = iter([100.0, 1.0, 2.0, 6.0])  # of the network; the warm-up run comes first
    monkeypatch.setattr(networks, "time_interleaved", run_all)
    monkeypatch.setattr(networks.Subject, "sample", lambda self: None)
    monkeypatch.setattr(networks.Stopwatch, "seconds", lambda self: {"network": next(seconds), "decoder": 0.5})
    (record,) = measure_sampling([SETTING], CPU, 3)
    assert (record["images_per_s"], record["tokens_per_s"]) == (0.5, 340)
    assert (record["network_s_per_image"], record["decoder_s_per_image"]) == (1, 0.25)
    assert (record["flops_per_image"], record["token_steps_per_image"]) == (11 * 10**8, 1360)
    assert record["matmul_share"] == pytest.approx(5.5e8 / MATMUL)
