import numpy as np
import pytest
import torch
from PIL import Image

from lightning_mvar.metrics.extractors.preprocessing import preprocess


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(32, 32), (256, 256), (90, 300)])
def test_images_are_resized_like_pillow(shape: tuple[int, int], mode: str) -> None:
    pixels = torch.randint(256, (*shape, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    resized = Image.fromarray(pixels.numpy()).resize((160, 224), Image.Resampling[mode.upper()])
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = (np.asarray(resized) / 255 - mean) / std
    actual = preprocess(pixels.permute(2, 0, 1)[None] / 255, (224, 160), mean, std, mode)[0].permute(1, 2, 0)
    levels = (actual - torch.from_numpy(expected)).abs() * torch.tensor(std) * 255
    assert levels.max() < 1.01  # Pillow's weights are fixed-point numbers
    assert levels.mean() < 0.1
