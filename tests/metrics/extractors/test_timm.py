"""Models of timm with random weights: nothing is downloaded."""

import pytest
import torch

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.extractors.preprocessing import preprocess
from lightning_mvar.metrics.extractors.timm_models import Timm
from lightning_mvar.metrics.summary import describe_extractor

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_features_are_those_of_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def with_random_weights(model: str, pretrained: bool, **options: int) -> torch.nn.Module:
        assert pretrained
        torch.manual_seed(0)
        return create(model, **options)

    monkeypatch.setattr(timm, "create_model", with_random_weights)
    extractor, network = Timm(name), with_random_weights(name, True, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(network)
    images = torch.rand(2, 3, 40, 50)
    pixels = preprocess(images, config["input_size"][1:], config["mean"], config["std"], config["interpolation"])
    with torch.no_grad():
        features = extractor(images)
        assert torch.equal(features, network(pixels))
    assert features.shape == (2, extractor.num_features)
    assert describe_extractor(extractor).endswith(f"Timm(model={name!r})")


def test_unknown_models_are_told() -> None:
    with pytest.raises(InputError, match=r"timm cannot load nothing \(.*\): timm\.list_models\(\) lists all"):
        Timm("nothing")
