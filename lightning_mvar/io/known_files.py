"""Published files that are downloaded when they are first needed: weights of extractors, ADM's references.

They are kept in the folder of torch.hub, `$TORCH_HOME/hub/checkpoints` (by default in `~/.cache/torch`), where
torchvision, torch-fidelity and pytorch-fid look for the same weights. Without network access, or if HF_HUB_OFFLINE is
set, put a file there by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import fetch_once, remote_file_name
from lightning_mvar.io.tensors import load_strictly, read_torch

RETRIES = 2  # few further attempts, so that the error appears within seconds if there is no network
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


@dataclass(frozen=True)
class KnownFile:
    """A published file.

    Args:
        url: its address.
        size: size in bytes; None if unknown, then it is not checked.
        sha256: SHA-256 as hex digits; None if unknown, then it is not checked.
    """

    url: str
    size: int | None = None
    sha256: str | None = None

    def path(self, given: str | None = None) -> Path:
        """Returns the path `given` by the user, or that of the downloaded file, which all processes share.

        Raises:
            InputError: if `given` does not exist, or the file is neither present nor available.
        """
        if given is not None:
            path = Path(given).expanduser()
            if not path.exists():
                raise InputError(f"{path} does not exist; download it from {self.url}")
            return path
        path = Path(torch.hub.get_dir()) / "checkpoints" / remote_file_name(self.url)
        if not path.is_file():
            self.download(path)
        elif self.size is not None and (found := path.stat().st_size) != self.size:
            raise InputError(f"{path} has {found} bytes instead of {self.size}: remove it, to download it again")
        return path

    def load_into(self, module: nn.Module, given: str | None = None, replaced: Mapping[str, Tensor] = {}) -> None:
        """Loads the file, see `path`, into a module strictly; sets eval mode and disables gradients.

        Args:
            module: built on the meta device, so that memory holds its weights once.
            given: path of the user's file.
            replaced: named tensors that replace those of the file, which may lack them.

        Raises:
            InputError: if the file is unavailable or has other content.
        """
        path = self.path(given)
        load_strictly(module, read_torch(path) | {**replaced}, path).requires_grad_(False)

    def download(self, path: Path) -> None:
        by_hand = f"download {self.url} on another machine and save it as {path}"
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{path.name} is not on this machine, and HF_HUB_OFFLINE is set: {by_hand}")
        size = "" if self.size is None else f" ({self.size / 1e6:.0f} MB)"
        tqdm.write(f"downloading {self.url}{size} to {path}", file=sys.stderr)
        fetch_once(self.url, path, RETRIES, self.size, self.sha256, remedy=by_hand)


INCEPTION = KnownFile(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
)
VGG16 = KnownFile(
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    553_433_881,
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
)
DINOV2_VITL14 = KnownFile(
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    1_217_586_395,
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
ADM_REFERENCES = {  # value of `--reference`; OpenAI publishes neither sizes nor hashes
    "imagenet64": KnownFile(f"{ADM}/64/VIRTUAL_imagenet64_labeled.npz"),
    "imagenet128": KnownFile(f"{ADM}/128/VIRTUAL_imagenet128_labeled.npz"),
    "imagenet256": KnownFile(f"{ADM}/256/VIRTUAL_imagenet256_labeled.npz"),
    "imagenet512": KnownFile(f"{ADM}/512/VIRTUAL_imagenet512.npz"),
}
