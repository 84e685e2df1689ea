"""A tiny model of transformers with random weights, in a folder: nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mvar.errors import InputError
from lightning_mvar.metrics.extractors.preprocessing import preprocess
from lightning_mvar.metrics.extractors.transformers_models import Transformers
from lightning_mvar.metrics.summary import describe_extractor

transformers = pytest.importorskip("transformers")
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
PREPROCESSING = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "resample": 3}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24, "image_size": 28}


def write_model(
    folder: Path, kind: str, preprocessing: dict[str, Any] = PREPROCESSING, **sizes: Any
) -> torch.nn.Module:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    model.save_pretrained(folder)
    config = preprocessing | {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, {"size": 28}, {"size": 32, "crop_size": 28}])
def test_features_are_the_pooled_output(preprocessing: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path, "Dinov2", preprocessing, patch_size=14, **SIZES)
    extractor, images = Transformers(str(tmp_path)), torch.rand(2, 3, 40, 50)
    pixels = preprocess(images, (28, 28), MEAN, STD)
    with torch.no_grad():
        features = extractor(images)
        assert torch.equal(features, model(pixels).last_hidden_state[:, 0])
    assert features.shape == (2, extractor.num_features) == (2, 12)
    assert describe_extractor(extractor).endswith(f"Transformers(model={str(tmp_path)!r})")


def test_models_without_pooled_features_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "Dinov2", patch_size=14, **SIZES)
    config = transformers.ViTConfig(patch_size=14, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no weights .*pooler.*: its pooled features would be random"):
        Transformers(str(tmp_path))
    write_model(tmp_path, "ViT", patch_size=14, **SIZES)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not specify the size, mean and std of its images"):
        Transformers(str(tmp_path))
    with pytest.raises(InputError, match="transformers cannot load"):
        Transformers(str(tmp_path / "nowhere"))
