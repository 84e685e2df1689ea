import pytest
import torch
from conftest import Projection
from torch import nn

from lightning_mvar.metrics import scores as module
from lightning_mvar.metrics.image_sets import open_image_set
from lightning_mvar.metrics.precision_recall import precision_recall
from lightning_mvar.metrics.reference import measure
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary


class Classifier(Projection):
    """Has logits, so it gives an inception score."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.num_features, 5)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)


@pytest.fixture
def reference() -> Summary:
    torch.manual_seed(0)
    return measure(Projection(), open_image_set("digits:test", 32), "")


def scored(extractor: Projection, reference: Summary, images: torch.Tensor, batch: int, **options: int) -> dict:
    scores = Scores(extractor, reference, len(images), **options)
    for numbers in torch.arange(len(images)).split(batch):
        scores.update(images[numbers], numbers)
    scores.update(images[:0], torch.arange(0))
    return scores.compute()


def test_the_scores_do_not_depend_on_the_batches_and_equal_their_parts(reference: Summary) -> None:
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


def test_what_extractor_or_reference_do_not_allow_is_left_out(reference: Summary) -> None:
    torch.manual_seed(0)
    extractor, images = Projection(), torch.rand(20, 3, 8, 8)
    assert scored(extractor, Summary(reference.statistics), images, 20).keys() == {"fid"}


def test_real_images_score_perfectly_against_themselves(reference: Summary) -> None:
    torch.manual_seed(0)
    source = open_image_set("digits:test", 32)
    images = torch.cat([*source.batches(0, len(source))])
    found = scored(Projection(), reference, images, 64)
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1


def test_precision_and_recall_are_of_no_more_samples_than_fit(
    reference: Summary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FEATURES", 20)
    torch.manual_seed(0)
    extractor, images = Projection(), torch.rand(58, 3, 8, 8)
    found = scored(extractor, reference, images, 7)
    with torch.no_grad():
        features = extractor(images[::3])  # 58 images: the numbers 0, 3, ... 57 are spread evenly
    assert (found["precision"], found["recall"]) == precision_recall(reference.features, features)
