"""Tests of image sets read from files, decoded from shards or reconstructed, and of the ranges of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import write_images, write_token_shards

from lightning_mvar import Tokenizer
from lightning_mvar.data.images.sources import open_images
from lightning_mvar.data.tokens import shards
from lightning_mvar.data.tokens.shards import read_shard
from lightning_mvar.errors import InputError
from lightning_mvar.metrics import image_sets as module
from lightning_mvar.metrics.image_sets import BATCH_SIZE, Reconstructions, SourceImages
from lightning_mvar.metrics.reference import open_reference
from lightning_mvar.sampling.readers import NpzSamples


def test_images_come_in_order_with_and_without_workers() -> None:
    source = open_images("digits:test", 32)
    expected = torch.stack([source[i].image for i in range(100, 300)]) / 2 + 0.5
    before = torch.get_rng_state()
    for workers in (0, 2):
        batches = list(SourceImages(source, workers).batches(100, 300))
        assert torch.equal(torch.get_rng_state(), before)
        assert [len(batch) for batch in batches] == [BATCH_SIZE] * 3 + [8]
        torch.testing.assert_close(torch.cat(batches), expected)


def test_processes_that_read_an_npz_do_not_share_a_file_position(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3)).astype(np.uint8)
    np.savez_compressed(tmp_path / "a.npz", arr_0=pixels)
    samples = NpzSamples(tmp_path / "a.npz")
    assert (samples.pixels(5) == pixels[5]).all()  # opened here, before processes are forked
    images = torch.cat([*SourceImages(samples, 2).batches(0, 300)])
    torch.testing.assert_close(images, torch.from_numpy(pixels).movedim(-1, 1) / 255)


def test_shards_are_decoded_in_order_from_any_index(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "PACK_SIZE", 32)  # the first shard has three packs
    manifest = write_token_shards(tmp_path, tokenizer.fingerprint(), [70, 20, 30])
    images = open_reference(str(tmp_path)).images(8, tokenizer)
    assert len(images) == 120
    packs = [pack.tokens for s in manifest.shards for pack in read_shard(tmp_path / s.name, s, manifest.spec)]
    tokens = torch.from_numpy(np.concatenate(packs).astype(np.int64))
    expected = (tokenizer.decode(tokens) + 1) / 2
    for begin, end in ((0, 120), (30, 70), (33, 60), (65, 95), (90, 90), (119, 120)):
        decoded = torch.cat([torch.empty(0, 3, 8, 8), *images.batches(begin, end)])
        torch.testing.assert_close(decoded, expected[begin:end])


def test_shards_have_the_margin_of_their_images(tmp_path: Path, tokenizer: Tokenizer) -> None:
    manifest = write_token_shards(tmp_path, tokenizer.fingerprint(), [4])
    assert open_reference(str(tmp_path)).images(8, tokenizer).crop == "var"
    replace(manifest, margin=1.0).save(tmp_path)
    assert open_reference(str(tmp_path), margin=1.0).images(8, tokenizer).crop == "var-1.0"
    with pytest.raises(InputError, match=r"cropped by var-1.0, not var: use crop var and margin 1.0"):
        open_reference(str(tmp_path)).images(8, tokenizer)


def test_shards_may_be_remote(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_token_shards(tmp_path / "tokens", tokenizer.fingerprint(), [70, 20])
    local, remote = (open_reference(source).images(8, tokenizer) for source in ("tokens", "pipe:cat tokens/{}"))
    assert local.identity == remote.identity
    for expected, images in zip(local.batches(60, 80), remote.batches(60, 80), strict=True):
        assert torch.equal(images, expected)


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_token_shards(tmp_path, "0123456789abcdef", [4])
    with pytest.raises(InputError, match="holds token shards: pass the tokenizer that encoded them as --tokenizer"):
        open_reference(str(tmp_path)).images(8)
    with pytest.raises(InputError, match="were made by tokenizer 0123456789abcdef, not by"):
        open_reference(str(tmp_path)).images(8, tokenizer)


def test_reconstructions_are_decoded_codes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_images(tmp_path)
    images = open_reference(str(tmp_path)).images(8)
    (originals,) = images.batches(0, 18)
    (reconstructed,) = Reconstructions(images, tokenizer).batches(0, 18)
    torch.testing.assert_close(reconstructed, (tokenizer.decode(tokenizer.encode(originals * 2 - 1)) + 1) / 2)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"a\.npz are 16 x 16, but the images to score are 8 x 8"):
        open_reference(str(tmp_path / "a.npz")).images(8)


def test_the_ranges_of_the_ranks_cover_all_images_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    ranges = []
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        ranges.append(module.shard_range(10))
    assert ranges == [(0, 2), (2, 5), (5, 7), (7, 10)]
