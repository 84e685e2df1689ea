"""Classifiers of the embedded images, as feature extractors.

Distances in their features say how images of this project compare with each other; they are not comparable to any
published FID.
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
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class EmbeddedClassifier(nn.Module):
    """A small convolutional classifier of an embedded set, trained on its real training images in seconds.

    A subclass names the set, and says how its images are varied in training.

    Args:
        weights: file the trained weights are kept in; trained and written there if it does not exist.
        epochs: passes over the training images.
    """

    num_features = 64
    embedded: EmbeddedSet

    def __init__(self, weights: str, epochs: int = 25) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (self.embedded.resolution // 8) ** 2, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, len(self.embedded.class_names))
        path = Path(weights)
        if path.is_file():
            load_strictly(self, read_weights(path), path)
        else:
            self.train_on_real_images(epochs)
            save_weights(self, path)
        self.eval().requires_grad_(False)

    @classmethod
    def kept_in(cls, folder: str) -> Self:
        """The one that commands share, kept among the statistics of real images."""
        return cls(str(Path(folder) / f"{cls.embedded.name}_classifier.safetensors"))

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) float32 in [0, 1], of the set's resolution -> features (b, 64)."""
        return self.features(images * 2 - 1)

    def logits(self, features: Tensor) -> Tensor:
        """Features (b, 64) -> (b, classes)."""
        return self.head(features)

    def classify(self, images: Tensor) -> Tensor:
        """Images (b, 3, H, W) in [0, 1] -> the likeliest class (b,) int64."""
        return self.logits(self(images)).argmax(dim=-1)

    @abstractmethod
    def vary(self, wide: Tensor) -> Tensor:
        """A batch of images with their margin -> (b, 3, H, W), changed by chance as the set's images may be."""

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train_on_real_images(self, epochs: int, batch_size: int = 64) -> None:
        """Cross entropy on the training split, each batch varied; the same weights from every call."""
        wide, labels = self.embedded.load_wide("train")
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
                    loss = F.cross_entropy(self.head(self(self.vary(wide[rows]) / 2 + 0.5)), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
