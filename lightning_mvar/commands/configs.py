"""`configs`: lists the configuration files that come with the package, or copies them."""

from __future__ import annotations

import re
import shutil
import textwrap
from itertools import takewhile
from pathlib import Path

from lightning_mvar.cli.help import MAX_WIDTH
from lightning_mvar.errors import InputError
from lightning_mvar.io.configs import PACKAGED
from lightning_mvar.io.files import create_folder

NAME_WIDTH = 48  # characters


def configs(copy: str | None = None) -> None:
    """Lists the configuration files that come with the package, or copies them.

    Commands that take a configuration file accept these names in any working directory; a file of that name in the
    working directory takes precedence.

    Args:
        copy: new folder to copy the files to, such as configs.
    """
    if copy is None:
        for path in sorted(PACKAGED.rglob("*.yaml")):
            name = f"configs/{path.relative_to(PACKAGED)}".ljust(NAME_WIDTH)
            print(name + textwrap.shorten(title(path), MAX_WIDTH - NAME_WIDTH, placeholder=" ..."))
        return
    folder = Path(copy)
    create_folder(folder, "choose another --copy")
    if any(folder.iterdir()):
        raise InputError(f"--copy {copy} is not empty: name a new folder")
    shutil.copytree(PACKAGED, folder, dirs_exist_ok=True)
    print(f"copied to {copy}")


def title(path: Path) -> str:
    """Returns the first sentence of a file's header."""
    header = takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    return re.split(r"\.(?: |$)", " ".join(line.lstrip("# ") for line in header))[0]
