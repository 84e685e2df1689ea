from pathlib import Path

import pytest
import torch

from lightning_mvar.data.images.examples import Views, collate, find_by_key
from lightning_mvar.data.images.sources import open_images


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_drawn_from_seed_and_index_alone(image_folder: Path, workers: int) -> None:
    source = open_images(str(image_folder), 16)
    views = Views(source, 3, seed=1)
    assert len(views) == 12
    loader = torch.utils.data.DataLoader(views, batch_size=5, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    images = torch.cat([batch.images for batch in batches])
    assert [key for batch in batches for key in batch.keys][:4] == [
        "a/4.webp#0",
        "a/4.webp#1",
        "a/4.webp#2",
        "a/deep/3.jpeg#0",
    ]
    assert all(torch.equal(views[i].image, images[i]) for i in reversed(range(12)))
    assert not all(torch.equal(images[3 * i], images[3 * i + 1]) for i in range(4))
    assert not torch.equal(images, torch.stack([Views(source, 3, seed=2)[i].image for i in range(12)]))
    before = torch.random.get_rng_state()
    assert views[0].key == "a/4.webp#0"
    assert torch.equal(torch.random.get_rng_state(), before)


def test_keys_without_a_valid_view_number_are_not_found(image_folder: Path) -> None:
    source = open_images(str(image_folder), 16)
    keys = ["a/4.webp", "a/4.webp#x", "a/4.webp#-1", "a/4.webp#2", "a/4.webp#" + "9" * 5000, "a/4.webp#1"]
    found = find_by_key(source, 2, 0, False, keys)
    assert [example and example.key for example in found] == [None] * 5 + ["a/4.webp#1"]
