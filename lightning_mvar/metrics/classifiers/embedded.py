"""Classifiers of the embedded images, as feature extractors.

Distances in their features compare images within this project only; they are not comparable to published FID.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.data.builtin.base import EmbeddedSet
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights

if TYPE_CHECKING:
    from typing_extensions import Self


MAX_EPOCHS = 10_000


class EmbeddedClassifier(nn.Module):
    """A small convolutional classifier of an embedded set, trained on its real training images in seconds.

    A subclass names the set and defines its data augmentation.

    Args:
        weights: file of the trained weights; if it does not exist, the classifier is trained and written to it.
        epochs: passes over the training images.

    Raises:
        InputError: if `epochs` is not in [1, `MAX_EPOCHS`], or the file holds other weights.
    """

    num_features = 64
    embedded: EmbeddedSet

    def __init__(self, weights: str, epochs: int = 25) -> None:
        if epochs < 1:
            raise InputError(f"{type(self).__name__} needs epochs of at least 1, got {epochs}")
        if epochs > MAX_EPOCHS:
            raise InputError(f"{type(self).__name__} takes at most {MAX_EPOCHS} epochs, got {epochs}")
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (self.embedded.resolution // 8) ** 2, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, len(self.embedded.class_names))
        path = Path(weights).expanduser()
        if path.is_file():
            load_strictly(self, read_weights(path), path)
        else:
            self.train_on_real_images(epochs)
            save_weights(self, path)
        self.eval().requires_grad_(False)

    @classmethod
    def cached_in(cls, folder: str) -> Self:
        """Loads the classifier that commands share from the cache folder; trains it the first time."""
        return cls(str(Path(folder) / f"{cls.embedded.name}_classifier.safetensors"))

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, H, W) float32 in [0, 1], at the set's resolution, to features (b, 64)."""
        return self.features(images * 2 - 1)

    def logits(self, features: Tensor) -> Tensor:
        """Maps features (b, 64) to logits (b, classes)."""
        return self.head(features)

    def classify(self, images: Tensor) -> Tensor:
        """Returns the most likely class (b,) int64 of images (b, 3, H, W) in [0, 1]."""
        return self.logits(self(images)).argmax(dim=-1)

    @abstractmethod
    def augment(self, images: Tensor) -> Tensor:
        """Augments a batch of images with margin at random and crops it to (b, 3, H, W)."""

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train_on_real_images(self, epochs: int, batch_size: int = 64) -> None:
        """Minimizes cross entropy on the augmented training split, with a fixed seed."""
        images, labels = self.embedded.load_with_margin("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.reset_parameters()
            steps_per_epoch = -(-len(labels) // batch_size)
            optimizer = torch.optim.Adam(self.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps_per_epoch)
            for _ in tqdm(range(epochs), desc=f"{self.embedded.name} classifier", leave=False):
                for rows in torch.randperm(len(labels)).split(batch_size):
                    loss = F.cross_entropy(self.head(self(self.augment(images[rows]) / 2 + 0.5)), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
