"""Objects whose unpickling runs code."""

from __future__ import annotations

import os
from pathlib import Path


class Malicious:
    """Makes the folder `marker` if it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)
