import numpy as np
from PIL import Image

from lightning_mvar.sampling.grids import PADDING, picture_grid


def test_pictures_fill_a_grid_row_by_row_on_black() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(4)]
    pictures.append(Image.fromarray(rng.integers(0, 256, (5, 7), dtype=np.uint8)))
    grid = np.asarray(picture_grid(pictures, columns=3)).copy()
    assert grid.shape == (2 * (5 + PADDING) + PADDING, 3 * (7 + PADDING) + PADDING, 3)
    for i, picture in enumerate(pictures):
        top, left = PADDING + i // 3 * (5 + PADDING), PADDING + i % 3 * (7 + PADDING)
        cell = grid[top : top + 5, left : left + 7]
        assert (cell == np.asarray(picture.convert("RGB"))).all()
        cell[:] = 0
    assert not grid.any()
