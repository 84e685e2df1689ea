import pytest
import torch
from conftest import Projection
from torch import nn

from lightning_mvar.data.images import open_images
from lightning_mvar.metrics.precision_recall import precision_recall
from lightning_mvar.metrics.reference import Reference, measure
from lightning_mvar.metrics.scores import Scores


class Classifier(Projection):
    """Has logits, so it gives an inception score."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.num_features, 5)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


@pytest.fixture
def reference() -> Reference:
    torch.manual_seed(0)
    return measure(Projection(), open_images("digits:test", 32), "")


def scored(extractor: Projection, reference: Reference, images: torch.Tensor, batch: int, **options: int) -> dict:
    scores = Scores(extractor, reference, len(images), **options)
    for numbers in torch.arange(len(images)).split(batch):
        scores.update(images[numbers], numbers)
    scores.update(images[:0], torch.arange(0))
    return scores.compute()


def test_the_scores_do_not_depend_on_the_batches_and_equal_their_parts(reference: Reference) -> None:
    torch.manual_seed(0)
    extractor, images = Classifier(), torch.rand(60, 3, 8, 8)
    found = scored(extractor, reference, images, 7)
    assert found.keys() == {"fid", "is", "precision", "recall"}
    for name, value in scored(extractor, reference, images, 60).items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    with torch.no_grad():
        features = extractor(images)
    assert (found["precision"], found["recall"]) == precision_recall(reference.features, features)
    assert 1 <= found["is"] <= 5
    alone = scored(extractor, reference, images, 60, neighbours=0)
    assert alone.keys() == {"fid", "is"}


def test_what_extractor_or_reference_do_not_allow_is_left_out(reference: Reference) -> None:
    torch.manual_seed(0)
    extractor, images = Projection(), torch.rand(20, 3, 8, 8)
    assert scored(extractor, Reference(reference.statistics, None), images, 20).keys() == {"fid"}


def test_real_images_score_perfectly_against_themselves(reference: Reference) -> None:
    torch.manual_seed(0)
    source = open_images("digits:test", 32)
    images = torch.stack([source[i].image for i in range(len(source))]) / 2 + 0.5
    found = scored(Projection(), reference, images, 64)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1
