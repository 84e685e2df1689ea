"""The processes that tests start have everything imported: the fork server ignores what it cannot import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from processes import CONTEXT, PRELOADED


def write_modules(path: Path) -> None:
    path.write_text("\n".join(sys.modules))


def test_a_started_process_has_the_preloaded_modules(tmp_path: Path) -> None:
    process = CONTEXT.Process(target=write_modules, args=(tmp_path / "modules.txt",))
    process.start()
    process.join()
    installed = {name for name in PRELOADED if importlib.util.find_spec(name) is not None}
    assert installed <= set((tmp_path / "modules.txt").read_text().splitlines())
