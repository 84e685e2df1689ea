"""Small classifiers of a data set, trained on its real images, as feature extractors.

Distances in their features are comparable only on the same data, and not with published FID.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lightning_mvar.devices import device_of
from lightning_mvar.errors import InputError
from lightning_mvar.io.fetch import wait_for_lock
from lightning_mvar.io.tensors import load_strictly, read_weights, save_weights

BATCH_SIZE = 64
CACHE_REMEDY = "set --cache to another folder"


class TrainedClassifier(nn.Module, ABC):
    """A small convolutional classifier that is trained on the CPU in at most a minute when its weights are needed.

    The constructor neither reads images nor trains, because commands call it before they check their other inputs.
    A subclass loads the images and defines their augmentation.

    Args:
        name: name of the data set, for the progress bar.
        path: file of the trained weights; if it does not exist, the classifier is trained and written to it, by one
            process while others wait.
        side: height and width of the input images, in pixels.
        classes: number of classes.
        epochs: passes over the training images.

    Raises:
        InputError: if the file holds other weights.
    """

    num_features = 64
    comparable_with = "scores with the same extractor on the same data"

    def __init__(self, name: str, path: Path, side: int, classes: int, epochs: int) -> None:
        super().__init__()
        self.name, self.path, self.num_epochs = name, path, epochs
        self.has_weights = False
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * (side // 8) ** 2, self.num_features), nn.ReLU()),
        )
        self.head = nn.Linear(self.num_features, classes)
        if path.is_file():
            self.load_or_train()

    @abstractmethod
    def training_images(self) -> tuple[Tensor, Tensor]:
        """Returns images in the format that `augment` takes, and labels (n,) int64."""

    @abstractmethod
    def augment(self, images: Tensor) -> Tensor:
        """Augments a batch of training images at random: returns (b, 3, side, side) float32 in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (b, 3, side, side) float32 in [0, 1] to features (b, 64)."""
        self.load_or_train()
        return self.features(images * 2 - 1)

    def logits(self, features: Tensor) -> Tensor:
        """Maps features (b, 64) to logits (b, classes)."""
        self.load_or_train()
        return self.head(features)

    def classify(self, images: Tensor) -> Tensor:
        """Returns the most likely class (b,) int64 of each image; images as in `forward`."""
        return self.logits(self(images)).argmax(dim=-1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        self.load_or_train()
        return super().state_dict(*args, **kwargs)

    def load_or_train(self) -> None:
        """Loads the weights unless they are loaded already; trains and saves them if the file does not exist."""
        if self.has_weights:
            return
        device = device_of(self)
        self.cpu()
        self.has_weights = True  # the calls below must not come back here
        try:
            with wait_for_lock(self.path.with_name(f".{self.path.name}.lock"), CACHE_REMEDY):
                if self.path.is_file():  # another process may have written it in the meantime
                    self.load()
                else:
                    self.train_on_real_images()
                    save_weights(self, self.path)
        except BaseException:
            self.has_weights = False
            raise
        self.eval().requires_grad_(False).to(device)

    def load(self) -> None:
        try:
            load_strictly(self, read_weights(self.path), self.path)
        except InputError as error:
            raise InputError(f"{error}; remove the file to train the classifier again") from error

    @torch.inference_mode(False)
    @torch.enable_grad()
    @torch.autocast("cpu", enabled=False)
    def train_on_real_images(self) -> None:
        """Minimizes cross entropy on the augmented images, with a fixed seed."""
        images, labels = self.training_images()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in self.requires_grad_().modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.reset_parameters()
            steps_per_epoch = -(-len(labels) // BATCH_SIZE)
            optimizer = torch.optim.Adam(self.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 3e-3, total_steps=self.num_epochs * steps_per_epoch
            )
            for _ in tqdm(range(self.num_epochs), desc=f"{self.name} classifier", leave=False):
                for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
                    loss = F.cross_entropy(self.head(self(self.augment(images[rows]) / 2 + 0.5)), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
