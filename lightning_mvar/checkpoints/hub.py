"""Networks and tokenizers by name: those published for VAR, and any on the Hugging Face Hub.

    var-d16                                 a known name, see `NETWORKS` and `TOKENIZERS`
    OWNER/REPOSITORY:FILE[@REVISION]        a file of published weights
    OWNER/REPOSITORY[@REVISION]             a folder that `export` or `push_to_hub` wrote

Files are downloaded once, into the cache of huggingface_hub, by its rules: HF_HOME moves it, HF_HUB_OFFLINE=1 forbids
the network, HF_ENDPOINT names another server. No code of a repository is run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import RepositoryNotFoundError

from lightning_mvar.errors import InputError

PUBLISHED = (".pth", ".pt", ".bin", ".safetensors")  # suffixes of published files; training checkpoints end with .ckpt
EXPORT_FILES = ["config.json", "*.safetensors"]
VAR = "FoundationVision/var"
TOKENIZERS = {"vae-ch160v4096z32": f"{VAR}:vae_ch160v4096z32.pth"}
NETWORKS = {f"var-d{depth}": f"{VAR}:var_d{depth}.pth" for depth in (16, 20, 24, 30)} | {
    "var-d36-512": f"{VAR}:var_d36.pth"
}
ON_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(:(?P<file>[\w./-]+))?(@(?P<revision>[\w./-]+))?")


class Located(NamedTuple):
    """A local path, and the tokenizer that belongs to the network there if its file does not contain one."""

    path: Path
    tokenizer: str | None = None


def locate(place: str | Path, **hub: Any) -> Located:
    """Returns the local path of a network or tokenizer, which is downloaded first if its place is a name on the Hub.

    What exists as a local path, or looks like one (its first folder exists, it begins with a dot, or it has the suffix
    of a file and no colon), is never looked up on the Hub.

    Args:
        place: path, known name, or repository, see the top of this file.
        hub: options of `huggingface_hub.snapshot_download` and `hf_hub_download`: revision, token, cache_dir.

    Raises:
        InputError: if it cannot be downloaded.
    """
    name, path = str(place), Path(place).expanduser()
    known = name in NETWORKS or name in TOKENIZERS
    match = ON_HUB.fullmatch((NETWORKS | TOKENIZERS).get(name, name))
    if match is None or path.exists() or (not known and is_local(name, match["file"])):
        return Located(path)
    if match["revision"] is not None:
        hub |= {"revision": match["revision"]}
    if known and (cached := cached_file(match["repository"], match["file"], hub)) is not None:
        local = cached  # the Hub is not asked for a newer version of published weights
    else:
        local = download(match["repository"], match["file"], **hub)
    return Located(local, next(iter(TOKENIZERS)) if name in NETWORKS else None)


def cached_file(repository: str, file: str, hub: dict[str, Any]) -> Path | None:
    """Returns the local path of a file that is in the cache; `hub` has the options of downloads."""
    path = try_to_load_from_cache(repository, file, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    return Path(path) if isinstance(path, str) else None


def is_local(name: str, file: str | None) -> bool:
    """Returns whether a name that could be one on the Hub is a path; `file` is what follows its colon, if anything."""
    like_file = file is None and name.endswith((*PUBLISHED, ".ckpt"))
    return name.startswith(".") or like_file or Path(Path(name).parts[0]).exists()


def download(repository: str, file: str | None, **hub: Any) -> Path:
    """Returns the local path of a file of a repository, or of the folder with its export if `file` is None.

    Raises:
        InputError: if it cannot be downloaded.
    """
    try:
        if file is None:
            return Path(snapshot_download(repository, allow_patterns=EXPORT_FILES, **hub))
        return Path(hf_hub_download(repository, file, **hub))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repository} does not exist as a local path or as a repository that you may read: check the name, or log "
            f"in with `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        revision = hub.get("revision") or "main"
        what = f"tree/{revision}" if file is None else f"resolve/{revision}/{file}"
        raise InputError(
            f"{repository} does not exist as a local path or in the cache, and the Hub cannot be reached: download "
            f"https://huggingface.co/{repository}/{what} on another machine and pass its path"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        name = repository if file is None else f"{repository}:{file}"
        raise InputError(f"{name} cannot be downloaded ({' '.join(str(error).split())[:300]})") from error
