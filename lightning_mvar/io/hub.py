"""Networks and tokenizers by name: VAR's published weights, and any on the Hugging Face Hub.

    var-d16                                 a known name, see `NETWORKS` and `TOKENIZERS`
    OWNER/REPOSITORY:FILE[@REVISION]        a file of published weights
    OWNER/REPOSITORY[@REVISION]             a folder that `export` or `push_to_hub` wrote

Files are downloaded once, into the cache of huggingface_hub, with its usual variables: HF_HOME moves the cache,
HF_HUB_OFFLINE=1 forbids network access, HF_ENDPOINT selects another server. No code of a repository is run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from lightning_mvar.errors import InputError

PUBLISHED = (".pth", ".pt", ".bin", ".safetensors")  # suffixes of published files; training checkpoints end with .ckpt
EXPORT_FILES = ["config.json", "*.safetensors"]
VAR = "FoundationVision/var:{}@6d0ee6598a42f75079aa79e58b012b57b284c91b"
TOKENIZERS = {"vae-ch160v4096z32": VAR.format("vae_ch160v4096z32.pth")}
NETWORKS = {f"var-d{depth}": VAR.format(f"var_d{depth}.pth") for depth in (16, 20, 24, 30)} | {
    "var-d36-512": VAR.format("var_d36.pth")
}
SHA256 = {  # by place; unknown for var_d36.pth
    VAR.format(file): digest
    for file, digest in {
        "vae_ch160v4096z32.pth": "7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
        "var_d16.pth": "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
        "var_d20.pth": "f7d232978e6fe82a4f2e0f5d82b012e01b1aa5abfe93ce2b56104ec0e878a10f",
        "var_d24.pth": "12c03619b2d3906ed19fe59539a90aadf60d72287dbaa31cf540435e76ddf789",
        "var_d30.pth": "7b11551dd4d794c7d6ed10b3d2822d42efe609a86128171b646e543dd2633b56",
    }.items()
}
KNOWN = NETWORKS | TOKENIZERS
ON_HUB = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+?)(:(?P<file>[\w./-]+))?(@(?P<revision>[\w./-]+))?")
NETWORK_KINDS = f"a checkpoint file, a folder that `export` wrote, published weights, or one of {', '.join(NETWORKS)}"
TOKENIZER_KINDS = f"a folder that `train-tokenizer` or `export` wrote, a published file, or {' or '.join(TOKENIZERS)}"


class Located(NamedTuple):
    """A local path, and the name of the tokenizer of a known network, whose file does not contain it."""

    path: Path
    tokenizer: str | None = None


def locate(place: str | Path, **hub: Any) -> Located:
    """Returns the local path of a network or tokenizer; downloads it first if `place` is a name on the Hub.

    Args:
        place: path, known name, or repository, see the top of this file.
        hub: options of `huggingface_hub.snapshot_download` and `hf_hub_download`: revision, token, cache_dir.

    Raises:
        InputError: if it cannot be downloaded, or a known file has the wrong hash.
    """
    match = name_on_hub(place)
    if match is None:
        return Located(Path(place).expanduser())
    if match["revision"] is not None:
        hub |= {"revision": match["revision"]}
    path = download(match["repository"], match["file"], **hub)
    return Located(path, next(iter(TOKENIZERS)) if str(place) in NETWORKS else None)


def name_on_hub(place: str | Path) -> re.Match[str] | None:
    """Returns the parts of a name to look up on the Hub; None for a path.

    A name is never looked up if it exists as a local path or looks like one: its first folder exists or is `outputs`,
    it begins with a dot, or it has the suffix of a weights file and no colon.
    """
    name = str(place)
    match = ON_HUB.fullmatch(KNOWN.get(name, name))
    if match is None or Path(place).expanduser().exists() or (name not in KNOWN and is_local(name, match["file"])):
        return None
    return match


def is_local(name: str, file: str | None) -> bool:
    """Returns whether a name that could be on the Hub looks like a path; `file` is the part after its colon, if any."""
    like_file = file is None and name.endswith((*PUBLISHED, ".ckpt"))
    return name.startswith((".", "outputs/")) or like_file or Path(Path(name).parts[0]).exists()


def download(repository: str, file: str | None, **hub: Any) -> Path:
    """Returns the local path of a file of a repository, or of the folder with its export if `file` is None.

    Raises:
        InputError: if it cannot be downloaded, or a known file has the wrong hash.
    """
    from huggingface_hub import errors  # imported here because it takes half a second

    name = repository if file is None else f"{repository}:{file}"
    try:
        return download_export(repository, hub) if file is None else download_file(repository, file, hub)
    except errors.RemoteEntryNotFoundError as error:
        missing = file or "config.json, which `export` and `push_to_hub` write"
        raise InputError(f"{repository} has no {missing}; {name_weights(repository, hub)}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repository} does not exist as a local path or as a repository that you may read: check the name, or log "
            f"in with `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        revision = hub.get("revision") or "main"
        what = f"tree/{revision}" if file is None else f"resolve/{revision}/{file}"
        raise InputError(
            f"{repository} does not exist as a local path or in the cache, and the Hub cannot be reached: download "
            f"https://huggingface.co/{repository}/{what} on another machine and pass its path"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise InputError(f"{name} cannot be downloaded ({' '.join(str(error).split())[:300]})") from error


def download_export(repository: str, hub: dict[str, Any]) -> Path:
    """Returns the local folder of an exported pipeline; `hub` holds download options."""
    config = Path(huggingface_hub.hf_hub_download(repository, "config.json", **hub))  # fails if it is missing
    commit = config.parent.name  # all files of one commit, even if another is pushed meanwhile
    return Path(
        huggingface_hub.snapshot_download(repository, allow_patterns=EXPORT_FILES, **hub | {"revision": commit})
    )


def download_file(repository: str, file: str, hub: dict[str, Any]) -> Path:
    """Returns the local path of a file; after a download, checks its SHA-256 if that is known."""
    cached = huggingface_hub.try_to_load_from_cache(repository, file, hub.get("cache_dir"), hub.get("revision"))
    path = Path(huggingface_hub.hf_hub_download(repository, file, **hub))
    if not isinstance(cached, str):
        check_content(path, SHA256.get(f"{repository}:{file}@{hub.get('revision')}"))
    return path


def name_weights(repository: str, hub: dict[str, Any]) -> str:
    """Lists the published weights of a repository for an error message."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = huggingface_hub.HfApi(token=hub.get("token"))
        files = api.list_repo_files(repository, revision=hub.get("revision"))
    except (HfHubHTTPError, OSError):
        return "its files cannot be listed"
    end = f"@{hub['revision']}" if hub.get("revision") else ""
    weights = [f"{repository}:{file}{end}" for file in files if file.endswith(PUBLISHED)]
    return f"it has {', '.join(weights) or 'no weights'}"


def check_content(path: Path, expected: str | None) -> None:
    """Removes a downloaded file and raises InputError if its SHA-256 is not the expected one; None expects nothing."""
    from lightning_mvar.io.fingerprint import sha256_of  # imported here because it imports torch

    if expected is None or (found := sha256_of(path)) == expected:
        return
    path.resolve().unlink()  # `path` is a link to the content
    path.unlink(missing_ok=True)
    raise InputError(
        f"the downloaded {path.name} has the SHA-256 {found} instead of {expected}, and was removed: run the command "
        f"again; if that fails, download the file by hand and pass its path"
    )
