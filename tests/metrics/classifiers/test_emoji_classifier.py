from pathlib import Path

import torch

from lightning_mvar.metrics.classifiers.emoji import Emoji64Classifier


def test_emoji_are_augmented_by_shifts_over_white(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    classifier = Emoji64Classifier(str(tmp_path / "weights.safetensors"))
    canvas = torch.ones(2, 3, 14, 14)
    canvas[:, :, 4:10, 4:10] = images
    crops = [canvas[:, :, top : top + 6, left : left + 6] for top in range(9) for left in range(9)]
    torch.manual_seed(0)
    batches = [classifier.augment(images) for _ in range(60)]
    indices = [[torch.equal(batch, crop) for crop in crops].index(True) for batch in batches]
    assert {index // 9 for index in indices} == {index % 9 for index in indices} == set(range(9))
