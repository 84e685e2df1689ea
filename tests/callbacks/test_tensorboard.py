"""TensorBoard's event file if it cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_mvar.callbacks.tensorboard import survive_write_errors


def test_a_full_disk_ends_the_curves_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = SummaryWriter(tmp_path)
    survive_write_errors(writer)
    writer.add_scalar("loss", 1.0, 0)
    writer.flush()
    records = writer._get_file_writer().event_writer._async_writer._writer.records
    sound = records._writer
    with open("/dev/full", "wb", buffering=0) as full:
        records._writer = full
        for step in range(1, 200):
            writer.add_scalar("loss", 1.0, step)
            writer.flush()
        records._writer = sound
    writer.close()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"cannot write TensorBoard's events to {tmp_path} (No space left on device): training")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0]
