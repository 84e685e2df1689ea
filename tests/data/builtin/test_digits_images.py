import torch

from lightning_mvar.data.builtin.digits import load_digits


def test_digits_are_a_fixed_stratified_split_in_range() -> None:
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    assert (train.shape, test.shape) == ((1347, 3, 32, 32), (450, 3, 32, 32))
    assert train.min() == -1
    assert train.max() == 1
    class_shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (train_labels, test_labels)]
    assert (class_shares[0] - class_shares[1]).abs().max() < 0.003
    assert not (train[:, None, 0].flatten(2) == test[None, :60, 0].flatten(2)).all(dim=2).any()


def test_downscaled_digits_equal_the_scans() -> None:
    from sklearn.datasets import load_digits as load_scans

    scans = torch.tensor(load_scans().images / 16, dtype=torch.float32).flatten(1)
    images, _ = load_digits("test")
    small = torch.nn.functional.adaptive_avg_pool2d(images[:20, 0], 8).flatten(1) / 2 + 0.5
    nearest = torch.cdist(small, scans).min(dim=1).values / 8  # root mean square over the 64 pixels
    assert nearest.max() < 0.1
