from pathlib import Path

import pytest

from lightning_mvar.data.images.sources import open_images
from lightning_mvar.errors import InputError


def test_missing_and_empty_folders_and_wrong_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_images(str(tmp_path / "nowhere"), 16)
    with pytest.raises(InputError, match="no images under"):
        open_images(str(tmp_path), 16)
    with pytest.raises(InputError, match="digits have the splits train, test, subtrain and validation, not 'val'"):
        open_images("digits:val", 32)
    with pytest.raises(InputError, match="32 x 32"):
        open_images("digits:test", 64)
