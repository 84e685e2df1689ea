"""Benchmark subjects: state sizes against formulas, partial runs against the complete network."""

import pytest
import torch
from conftest import MIXERS, SCHEDULE, tiny_network

from lightning_mvar import MVARConfig, TokenizerConfig
from lightning_mvar.bench.subjects import Setting, Subject, rerun_prefix, run_with_state
from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import state_bytes

TOKENIZER = TokenizerConfig(SCHEDULE, 48, 8, channels=8, multipliers=(1, 2), blocks=1, num_phi=3)


def tiny_config(mixer: str, **overrides: object) -> MVARConfig:
    return tiny_network(mixers=MIXERS[mixer], **overrides).config


def test_the_state_of_mvar_is_constant_and_that_of_var_is_a_kv_cache() -> None:
    mvar, var = tiny_config("mvar"), tiny_config("var")
    inner, n = 2 * 64, 64
    assert state_bytes(mvar, torch.float32) == 2 * 4 * (3 * (inner + 2 * n) + inner * n)
    assert state_bytes(var, torch.bfloat16) == 2 * 2 * 2 * SCHEDULE.num_tokens * 64


def test_mixers_are_baselines_or_names_joined_by_plus() -> None:
    assert Setting(mixer="scale_attention+mamba1").network.mixers == ("scale_attention", "mamba1")
    raster = Setting(mixer="ar_raster").network
    assert (raster.prediction, raster.schedule.side_lengths) == ("token", (16,))


@torch.no_grad()
def test_carried_state_and_prefix_rerun_equal_the_full_pass() -> None:
    network = tiny_network()
    x = torch.randn(2, SCHEDULE.num_tokens, 64, generator=torch.Generator().manual_seed(0))
    for mixer in network.blocks[0].mixers:
        full, _ = mixer(x, SCHEDULE.shapes)
        torch.testing.assert_close(run_with_state(mixer, x, SCHEDULE.shapes), full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rerun_prefix(mixer, x, SCHEDULE.shapes), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_subject_samples_and_trains(mixer: str) -> None:
    subject = Subject(tiny_config(mixer), TOKENIZER, 3)
    network = subject.network
    images = subject.sample()
    assert images.shape == (3, 3, 8, 8)
    before = {name: p.clone() for name, p in network.named_parameters()}
    subject.training_step()()
    unchanged = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    # The gradients of A_log and dt_bias vanish with random weights.
    assert [name for name in unchanged if not name.endswith(("A_log", "dt_bias"))] == []


def test_settings_change_by_name() -> None:
    setting = Setting().with_changes("mixer=var, batch_size=2,compile=true")
    assert (setting.mixer, setting.batch_size, setting.compile, setting.size) == ("var", 2, True, "d16")
    wrongs = ("mixer", "mixer=mamba", "width=3", "batch_size=two", "batch_size=0", "resolution=300")
    for wrong in (*wrongs, "compile=1"):
        with pytest.raises(InputError):
            Setting().with_changes(wrong)
