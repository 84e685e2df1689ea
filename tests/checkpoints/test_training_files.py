"""Which checkpoint is the newest, whether it is complete, and the link to it, wherever a run is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_mvar.checkpoints.training import (
    LAST,
    check_intact,
    hidden_path,
    mend_last,
    newest_first,
    newest_intact,
    publish,
    remove_leftovers,
    resolve_last,
    size_and_crc,
)
from lightning_mvar.errors import InputError


def write(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    torch.save({"global_step": step}, path)
    return path


def test_the_newest_has_the_highest_step_whatever_the_clocks_say(tmp_path: Path) -> None:
    """Steps of more than eight digits count too; other files, such as a copy that the user keeps, do not."""
    steps = [2, 100_000_000, 99_999_999, 10]
    for age, step in enumerate(steps):
        os.utime(write(tmp_path, step), (age, age))
    for name in ("step=.ckpt", "step=3.ckpt.bak", "keep.ckpt", ".step=00000011.ckpt.unfinished"):
        (tmp_path / name).touch()
    (tmp_path / "step=200000000.ckpt").symlink_to("step=00000002.ckpt")  # a link has the step of another
    assert [int(path.stem[5:]) for path in newest_first(tmp_path)] == sorted(steps, reverse=True)


def test_what_killed_runs_left_is_removed_but_nothing_that_it_links_to(tmp_path: Path) -> None:
    kept, folder = write(tmp_path, 1), tmp_path / "elsewhere"
    for path in (folder, tmp_path / ".step=2.ckpt.removed"):
        path.mkdir()
        (path / "shard").touch()
    (tmp_path / ".step=3.ckpt.unfinished").touch()
    (tmp_path / ".step=4.ckpt.removed").symlink_to(folder)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [folder, kept]
    assert (folder / "shard").is_file()


def test_incomplete_ones_are_skipped_and_checksums_are_read_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, altered, cut = write(tmp_path, 1), write(tmp_path, 2), write(tmp_path, 3)
    content = bytearray(altered.read_bytes())
    content[content.index(b"global_step")] ^= 1
    altered.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    os.mkfifo(tmp_path / "step=00000004.ckpt")
    assert newest_intact(tmp_path) == altered
    assert newest_intact(tmp_path, verify_checksums=True) == older
    assert "step=00000004.ckpt is not a regular file" in caplog.text
    assert "step=00000003.ckpt is missing or damaged" in caplog.text
    assert "step=00000002.ckpt is damaged (in " in caplog.text


def test_a_sharded_one_is_complete_if_all_sizes_are_those_of_its_seal(tmp_path: Path) -> None:
    temporary, path = tmp_path / "new", tmp_path / "step=00000007.ckpt"
    temporary.mkdir()
    (temporary / "__0_0.distcp").write_bytes(b"shard")
    publish(temporary, path, {"__0_0.distcp": size_and_crc(temporary / "__0_0.distcp")})
    check_intact(path, verify_checksums=True)
    (path / "__0_0.distcp").write_bytes(b"SHARD")
    check_intact(path)
    with pytest.raises(InputError, match=r"__0_0.distcp is damaged: its CRC-32 is not that of the seal"):
        check_intact(path, verify_checksums=True)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(InputError, match="it has 0 bytes, but 5 were written"):
        check_intact(path)
    (path / "seal.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(InputError, match="not a finished checkpoint"):
        check_intact(path)


@pytest.mark.parametrize("killed_before", ["link", "checkpoint", "nothing"])
def test_a_kill_while_publishing_never_leaves_old_weights_behind_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_before: str
) -> None:
    """The link comes first, so it leads to nothing or to the newest; and readers look beside it, not where it leads."""
    old, new = write(tmp_path, 1), tmp_path / "step=00000002.ckpt"
    publish(old.rename(tmp_path / "old"), old, link=True)
    temporary = write(tmp_path, 2).rename(hidden_path(new, "unfinished"))
    replace, stop_at = os.replace, {"link": LAST, "checkpoint": new.name}.get(killed_before)

    def replace_or_die(source: Path, target: Path) -> None:
        if target.name == stop_at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        if stop_at is None:
            publish(temporary, new, link=True)
        else:
            with pytest.raises(KeyboardInterrupt):
                publish(temporary, new, link=True)
    link, newest = tmp_path / LAST, new if killed_before == "nothing" else old
    assert os.readlink(link) == (old.name if killed_before == "link" else new.name)
    assert resolve_last(link) == newest
    mend_last(tmp_path)
    assert os.readlink(link) == newest.name


def test_a_stale_link_stands_for_the_newest_and_a_copy_for_itself(tmp_path: Path) -> None:
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    (tmp_path / LAST).symlink_to(old.name)
    assert resolve_last(tmp_path / LAST) == new
    assert resolve_last(old) == old
    (tmp_path / LAST).unlink()
    copy = write(tmp_path, 1).rename(tmp_path / LAST)
    mend_last(tmp_path)
    assert resolve_last(copy) == copy
    assert not copy.is_symlink()
