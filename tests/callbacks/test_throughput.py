"""Rates are compared with each other, not with a clock."""

from pathlib import Path

import pytest
from conftest import SCHEDULE, write_token_shards
from lightning.pytorch.callbacks import Callback
from lit_modules import make_module, make_trainer

from lightning_mvar import Tokenizer
from lightning_mvar.callbacks import ThroughputCallback
from lightning_mvar.errors import InputError
from lightning_mvar.models.costs import forward_flops
from lightning_mvar.training.datamodules import TokenDataModule


class MetricsRecorder(Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_: object) -> None:  # type: ignore[no-untyped-def]
        metrics = trainer.callback_metrics.items()
        self.metrics.append({name: float(value) for name, value in metrics if name.startswith("perf/")})


@pytest.mark.parametrize("peak", [None, 1e9])
def test_rates_of_images_tokens_and_flops_agree(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path, peak: float | None
) -> None:
    write_token_shards(tmp_path / "shards", tokenizer.fingerprint(), [40])
    module, recorder = make_module(tokenizer_folder), MetricsRecorder()
    data = TokenDataModule(str(tmp_path / "shards"), str(tmp_path / "shards"), batch_size=8)
    callbacks = [ThroughputCallback(peak_flops=peak), recorder]
    make_trainer(tmp_path, 5, callbacks=callbacks, limit_val_batches=0).fit(module, data)
    assert not recorder.metrics[0]
    for metrics in recorder.metrics[1:]:
        assert metrics["perf/images_per_s"] > 0
        assert metrics["perf/tokens_per_s"] == pytest.approx(SCHEDULE.num_tokens * metrics["perf/images_per_s"])
        assert ("perf/mfu" in metrics) == (peak is not None)
        if peak is not None:
            flops = 3 * forward_flops(module.network_config)
            assert metrics["perf/mfu"] == pytest.approx(flops * metrics["perf/images_per_s"] / peak)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be positive, got 0\.0"):
        ThroughputCallback(peak_flops=0.0)
