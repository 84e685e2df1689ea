import torch
from torch import Tensor

from lightning_mvar.data.builtin.digits import load_digits


def test_digits_are_a_fixed_stratified_split_in_range() -> None:
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert (train.shape, test.shape) == ((1347, 3, 32, 32), (450, 3, 32, 32))
    assert train.min() == -1
    assert train.max() == 1
    class_shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train_labels, test_labels)]
    assert (class_shares[0] - class_shares[1]).abs().max() < 0.003
    assert not equal_pairs(train, test[:60]).any()


def test_subtrain_and_validation_divide_the_training_digits_by_class() -> None:
    (train, train_labels), (subtrain, subtrain_labels) = load_digits("train"), load_digits("subtrain")
    validation, validation_labels = load_digits("validation")
    assert (len(subtrain), len(validation)) == (1010, 337)
    pairs = equal_pairs(train, torch.cat([subtrain, validation]))  # (1347, 1347), a permutation
    assert (pairs.sum(dim=0) == 1).all()
    assert (pairs.sum(dim=1) == 1).all()
    assert torch.equal(train_labels[pairs.int().argmax(dim=0)], torch.cat([subtrain_labels, validation_labels]))
    class_shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train_labels, validation_labels)]
    assert (class_shares[0] - class_shares[1]).abs().max() < 0.003


def equal_pairs(images: Tensor, others: Tensor) -> Tensor:
    """Returns which of the images (n, 3, 32, 32) equals which of the others (m, 3, 32, 32), as bool (n, m)."""
    return torch.stack([(images[:, 0] == other[0]).flatten(1).all(dim=1) for other in others], dim=1)


def test_downscaled_digits_equal_the_scans() -> None:
    from sklearn.datasets import load_digits as load_scans

    scans = torch.tensor(load_scans().images / 16, dtype=torch.float32).flatten(1)
    images, _ = load_digits("test")
    small = torch.nn.functional.adaptive_avg_pool2d(images[:20, 0], 8).flatten(1) / 2 + 0.5
    nearest = torch.cdist(small, scans).min(dim=1).values / 8  # root mean square over the 64 pixels
    assert nearest.max() < 0.1
