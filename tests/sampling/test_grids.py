import numpy as np
import torch
from PIL import Image, ImageFont

from lightning_mvar.sampling.grids import LONGEST_NAME, PADDING, picture_grid, shorten, with_row_names


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


def test_names_of_any_length_and_lines_fit_beside_their_rows() -> None:
    grid = torch.rand(3, 40, 30)
    names = ["x" * 1_000_000, "two\nlines", "\x00\u202e", ""]
    named = with_row_names(grid, names)
    assert LONGEST_NAME - 20 < named.shape[2] - 30 <= LONGEST_NAME + 2 * PADDING
    assert torch.equal(named[:, :, -30:], grid)


def test_a_long_text_keeps_its_end() -> None:
    font = ImageFont.load_default(11)
    text = shorten("/".join(["folder"] * 10_000 + ["image.png"]), font, 100)
    assert text.startswith("...")
    assert text.endswith("/image.png")
    assert font.getlength(text) <= 100 < font.getlength(f"..{text}")
    assert shorten("a short\nname", font, 100) == "a short name"
