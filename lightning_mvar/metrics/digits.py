"""Judges of generated digits: a small classifier as feature extractor, and a support vector machine.

Distances in the features of this classifier say how digits of this project compare with each other; they are not
comparable to any published FID.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.data.digits import load_digits
from lightning_mvar.weights import load_strictly, read_weights, save_weights

SCAN_SIDE = 8  # the scans' own resolution, on which the support vector machine judges


class DigitsClassifier(nn.Module):
    """A three-layer convolutional classifier of 32 x 32 digits, trained on the real training images in seconds.

    Args:
        weights: file the trained weights are kept in; trained and written there if it does not exist.
        epochs: passes over the training images.
    """

    num_features = 64

    def __init__(self, weights: str, epochs: int = 25) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * 4 * 4, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, 10)
        path = Path(weights)
        if path.is_file():
            load_strictly(self, read_weights(path), path)
        else:
            self.train_on_digits(epochs)
            save_weights(self, path)
        self.eval().requires_grad_(False)

    @classmethod
    def kept_in(cls, folder: str) -> DigitsClassifier:
        """The one that commands share, kept among the statistics of real images."""
        return cls(str(Path(folder) / "digits_classifier.safetensors"))

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 3, 32, 32) float32 in [0, 1] -> features (b, 64)."""
        return self.features(images * 2 - 1)

    def logits(self, features: Tensor) -> Tensor:
        """Features (b, 64) -> (b, 10)."""
        return self.head(features)

    def classify(self, images: Tensor) -> Tensor:
        """Images (b, 3, 32, 32) in [0, 1] -> the likeliest class (b,) int64."""
        return self.logits(self(images)).argmax(dim=-1)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def train_on_digits(self, epochs: int, batch_size: int = 64) -> None:
        """Cross entropy on the training split, shifted by up to two pixels; the same weights from every call."""
        images, labels = load_digits("train")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.reset_parameters()
            steps_per_epoch = -(-len(labels) // batch_size)
            optimizer = torch.optim.Adam(self.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps_per_epoch)
            for _ in tqdm(range(epochs), desc="digits classifier", leave=False):
                for rows in torch.randperm(len(labels)).split(batch_size):
                    shift = torch.randint(-2, 3, (2,)).tolist()
                    batch = images[rows].roll(shift, dims=(2, 3)) / 2 + 0.5
                    loss = F.cross_entropy(self.head(self(batch)), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()


def as_scans(images: Tensor) -> NDArray[np.float32]:
    """(n, 3, 32, 32) in [0, 1] -> (n, 64): grey, averaged to the scans' 8 x 8."""
    return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SCAN_SIDE).flatten(1).numpy()


def svm_accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> float:
    """Train a support vector machine (radial basis) on some images in [0, 1], score it on others, as 8 x 8 scans."""
    from sklearn.svm import SVC

    return float(SVC(C=10).fit(as_scans(images), labels.numpy()).score(as_scans(test_images), test_labels.numpy()))
