from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_mvar.data.images.sources import open_encoded
from lightning_mvar.errors import InputError
from lightning_mvar.projects.pictures import Pictures, inspect_pictures


def save(path: Path, size: tuple[int, int], mode: str = "RGB", alpha: int = 255) -> None:
    path.parent.mkdir(exist_ok=True)
    image = Image.new("RGBA", size, (200, 30, 30, 255))
    image.putpixel((0, 0), (0, 0, 0, alpha))
    image.convert(mode).save(path)


def look(folder: Path) -> Pictures:
    return inspect_pictures(open_encoded(str(folder), None, None), "pics")


def test_sizes_transparency_and_broken_pictures_are_found(tmp_path: Path) -> None:
    save(tmp_path / "a/opaque.png", (20, 30), "RGBA")
    save(tmp_path / "a/clear.png", (40, 40), "RGBA", alpha=254)
    save(tmp_path / "b/plain.jpg", (64, 48))
    (tmp_path / "b/torn.png").write_bytes((tmp_path / "a/clear.png").read_bytes()[:60])
    pictures = look(tmp_path)
    assert (pictures.count, pictures.class_names, pictures.transparent) == (4, ["a", "b"], 1)
    assert pictures.sizes.tolist() == [[40, 40], [20, 30], [64, 48]]
    assert pictures.side == 40
    assert not pictures.are_square
    (message,) = pictures.broken
    assert message.startswith(f"{tmp_path}/b/torn.png cannot be decoded (")


def test_a_flat_folder_of_nearly_square_pictures(tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / f"pics/{i}.png", (40, 42 if i else 80))
    pictures = look(tmp_path / "pics")
    assert pictures.class_names == ["pics"]
    assert pictures.oblong == 1 / 20
    assert pictures.are_square


def test_classes_that_are_empty_or_wholly_held_out_have_nothing_to_train_on(tmp_path: Path) -> None:
    for i in range(30):
        save(tmp_path / f"few/{i}.png", (8, 8))
        save(tmp_path / f"many/{i}.png", (8, 8))
    (tmp_path / "none").mkdir()
    assert look(tmp_path).untrained == ["none"]
    images = open_encoded(str(tmp_path), None, None)
    for index in np.flatnonzero(~images.held_out & (images.labels == 0)).tolist():
        Path(images.display_path(index)).unlink()
    assert look(tmp_path).untrained == ["few", "none"]


def test_a_set_without_a_sound_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of the 1 pictures of pics can be decoded: .*a\.png"):
        look(tmp_path)
