"""Tests of the pipeline: drawing, editing, saving, loading and the Hub."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCHEDULE, random_image, stack_images, tiny_network
from huggingface_hub import ModelCard
from PIL import Image

from lightning_mvar import Tokenizer, generate
from lightning_mvar.checkpoints import TrainedModel, save_folder
from lightning_mvar.checkpoints.card import MARK
from lightning_mvar.errors import InputError
from lightning_mvar.io.hub import Located
from lightning_mvar.pipeline import MVARPipeline
from lightning_mvar.sampling.grids import to_uint8
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.sampler import Drawing
from lightning_mvar.sampling.settings import SamplingSettings

NAMES = ["zero", *map(str, range(1, 10))]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_folder(tmp_path / "export", tokenizer, tiny_network(), NAMES)
    return tmp_path / "export"


@pytest.fixture
def pipe(folder: Path) -> MVARPipeline:
    return MVARPipeline.from_pretrained(folder, device="cpu")


def test_images_match_generate(pipe: MVARPipeline) -> None:
    images = pipe(["zero", 3, "unconditional"], guidance=2.0, seed=4)
    labels = torch.tensor([0, 3, 10])
    expected = generate(pipe.network, pipe.tokenizer, labels, guidance=2.0, generator=image_keys(4, range(3)))
    assert (stack_images(images) == to_uint8(expected)).all()
    assert images[0].size == (8, 8)


def test_repr_says_what_the_pipeline_draws(pipe: MVARPipeline) -> None:
    count = sum(parameter.numel() for parameter in pipe.network.parameters()) / 1e6
    assert repr(pipe) == f"MVARPipeline({count:.1f}M parameters, 2 blocks, 10 classes, 8 x 8 pixels, device=cpu)"


def test_images_that_are_not_finite_are_counted_instead_of_drawn_black(pipe: MVARPipeline) -> None:
    decode = pipe.tokenizer.decode_features
    for value in (torch.nan, torch.inf):
        pipe.tokenizer.decode_features = lambda f_hat, value=value: (
            decode(f_hat) + torch.tensor([0, value, 0])[:, None, None, None]
        )
        with pytest.raises(InputError, match="1 of 3 images are not finite"):
            pipe([0, 1, 2])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [0, 2, 3])
def test_logits_that_are_not_finite_at_one_scale_refuse_image_and_tokens(
    pipe: MVARPipeline, scale: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, lengths = pipe.network.step, pipe.network.config.schedule.lengths

    def overflow(inputs: torch.Tensor | None, state: object) -> tuple[torch.Tensor, object]:
        logits, state = step(inputs, state)
        if logits.shape[1] == lengths[scale]:
            logits[1, 0, 5] = value
        return logits, state

    monkeypatch.setattr(pipe.network, "step", overflow)
    drawing = Drawing(pipe.sampler, torch.arange(3), 1, SamplingSettings(guidance=0.0))
    for draw in (drawing.draw, drawing.draw_tokens):
        with pytest.raises(InputError, match="1 of 3 images are not finite"):
            draw(drawing.labels, [0, 1, 2])


def test_classes_can_be_mixed(pipe: MVARPipeline) -> None:
    images = pipe(["zero:0.7+8:0.3", "3"], seed=4)
    weights = torch.zeros(2, 11)
    weights[0, 0], weights[0, 8], weights[1, 3] = 0.7, 0.3, 1
    expected = generate(pipe.network, pipe.tokenizer, weights, generator=image_keys(4, range(2)))
    assert (stack_images(images) == to_uint8(expected)).all()
    assert (stack_images(images)[1] == stack_images(pipe(["zero", "3"], seed=4))[1]).all()


def test_every_scale_changes_the_image_and_the_last_completes_it(pipe: MVARPipeline) -> None:
    steps = [stack_images(images) for images in pipe.stream_images([1, 2], seed=0)]
    assert len(steps) == SCHEDULE.num_scales
    assert (steps[-1] == stack_images(pipe([1, 2], seed=0))).all()
    assert all((before != after).any() for before, after in pairwise(steps))


def test_black_in_the_mask_is_kept_and_white_is_redrawn(pipe: MVARPipeline) -> None:
    image = random_image()
    white, black = Image.new("L", (8, 8), 255), Image.new("L", (8, 8), 0)
    assert (stack_images(pipe.edit(image, white, [1, 2])) == stack_images(pipe([1, 2]))).all()
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        reconstruction = (pipe.tokenizer.decode(pipe.tokenizer.encode(pixels)) + 1) / 2
    kept = stack_images(pipe.edit(image, black, [1, 2]))
    assert np.abs(kept - to_uint8(reconstruction)).max() <= 1
    assert (kept == stack_images(pipe([1, 2], image=image))).all()


def test_a_single_class_draws_one_image_and_only_the_last_scale_is_decoded(
    pipe: MVARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (stack_images(pipe("zero")) == stack_images(pipe([0]))).all()
    assert (stack_images(pipe(3)) == stack_images(pipe(["3"]))).all()
    decoded, decode = [], pipe.tokenizer.decode_features
    monkeypatch.setattr(pipe.tokenizer, "decode_features", lambda f_hat: (decoded.append(1), decode(f_hat))[1])
    pipe([1, 2])
    assert len(decoded) == 1


def test_classes_may_be_arrays_tensors_or_numbers_of_any_integer_type(pipe: MVARPipeline) -> None:
    expected = stack_images(pipe(["zero", 3]))
    for classes in (
        [np.int64(0), torch.tensor(3)],
        ("zero", np.uint8(3)),
        np.array([0, 3]),
        torch.tensor([0, 3], dtype=torch.int32),
        np.array(["zero", "3"]),
        iter([0, 3]),
    ):
        assert (stack_images(pipe(classes)) == expected).all()
    for single in (np.int64(0), torch.tensor(0), np.array(0), "zero"):
        assert (stack_images(pipe(single)) == expected[:1]).all()


def test_images_of_a_class_and_a_generator_as_in_other_pipelines(pipe: MVARPipeline) -> None:
    images = pipe("zero", num_images=2, seed=4)
    assert (stack_images(images) == stack_images(pipe(["zero", "zero"], seed=4))).all()
    generator = torch.Generator().manual_seed(1)
    first, second = (stack_images(pipe("zero", generator=generator)) for _ in range(2))
    again = stack_images(pipe("zero", generator=torch.Generator().manual_seed(1)))
    assert (first == again).all()
    assert (first != second).any()
    with pytest.raises(InputError, match="give seed or generator, not both"):
        pipe("zero", generator=generator, seed=4)
    assert pipe.to("cpu") is pipe
    assert (stack_images(pipe("zero", num_images=2, seed=4)) == stack_images(images)).all()


@pytest.mark.parametrize(
    "classes", [True, [True], np.array([True]), torch.tensor([1.0]), np.array([[1]]), [[1]], [None], 1.0]
)
def test_other_types_of_classes_are_refused(pipe: MVARPipeline, classes: object) -> None:
    with pytest.raises(InputError, match="a class is a name or a whole number, got"):
        pipe(classes)  # type: ignore[arg-type]


def test_a_mask_without_image_and_saving_lowered_weights_are_rejected(
    folder: Path, pipe: MVARPipeline, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="a mask needs an image"):
        pipe([1], mask=Image.new("L", (8, 8)))
    lowered = MVARPipeline.from_pretrained(folder, device="cpu", precision="bfloat16")
    with pytest.raises(InputError, match="load the pipeline with precision float32"):
        lowered.save_pretrained(tmp_path / "lowered")


def test_images_and_masks_of_any_size_are_cropped_and_resized(pipe: MVARPipeline) -> None:
    wide, mask = random_image((40, 16), seed=1), Image.new("L", (40, 16), 0)
    mask.paste(255, (0, 0, 20, 16))
    small = Image.new("L", (8, 8), 0)
    small.paste(255, (0, 0, 4, 8))
    assert (stack_images(pipe.edit(wide, mask, [5])) == stack_images(pipe.edit(wide, small, [5]))).all()
    with pytest.raises(
        InputError, match=r"the mask is 16 x 16: resize it to the size of the image, 16 x 40 \(.*\), or"
    ):
        pipe.edit(wide, Image.new("L", (16, 16)), [5])


def test_a_saved_and_reloaded_pipeline_draws_the_same(pipe: MVARPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    reloaded = MVARPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert reloaded.class_names == NAMES
    assert (stack_images(reloaded([0])) == stack_images(pipe([0]))).all()


def test_a_saved_pipeline_replaces_the_card_of_another_but_no_edited_one(pipe: MVARPipeline, tmp_path: Path) -> None:
    for before, is_kept in ((f"{MARK} of another network", False), ("edited", True)):
        (tmp_path / "README.md").write_text(before)
        pipe.save_pretrained(tmp_path)
        assert ((tmp_path / "README.md").read_text() == before) == is_kept


def test_push_to_hub_uploads_the_export_files_with_a_model_card(
    pipe: MVARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaces the Hub client and checks the files passed to it."""
    uploaded: dict[str, bytes] = {}

    class Hub:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> object:
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path: str, **_: object) -> None:
            uploaded.update((path.name, path.read_bytes()) for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    random_image().save(tmp_path / "grid.png")
    pipe.push_to_hub("somebody/digits", model_card_kwargs={"picture": str(tmp_path / "grid.png"), "license": "mit"})
    weights = {"network.safetensors", "tokenizer.safetensors"}
    assert weights | {"config.json", "README.md", "samples.png"} == uploaded.keys()
    assert uploaded["samples.png"] == (tmp_path / "grid.png").read_bytes()
    with pytest.raises(InputError, match="repository digits has no owner"):
        pipe.push_to_hub("digits")
    card = ModelCard(uploaded["README.md"].decode())
    assert card.data.license == "mit"
    assert 'MVARPipeline.from_pretrained("somebody/digits")' in card.text


def test_a_repository_is_downloaded_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request: dict[str, object] = {}

    def download_file(repo_id: str, file: str, revision: str) -> str:
        assert (repo_id, file, revision) == ("somebody/digits", "config.json", "v1")
        return str(folder / file)

    def download(repo_id: str, **options: object) -> str:
        request.update(options, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    pipe = MVARPipeline.from_pretrained("somebody/digits", revision="v1", device="cpu")
    assert pipe.shape == (8, 8)
    assert (request["repo_id"], request["revision"]) == ("somebody/digits", folder.name)  # the commit
    assert request["allow_patterns"] == ["config.json", "*.safetensors"]


def test_a_revision_is_that_of_the_network_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, object]] = {}

    def locate(place: str, **hub: object) -> Located:
        asked[place] = hub
        return Located(folder)

    monkeypatch.setattr("lightning_mvar.pipeline.locate", locate)
    MVARPipeline.from_pretrained("a/network", tokenizer="b/codes", revision="v1", device="cpu", token="secret")
    assert asked == {"a/network": {"revision": "v1", "token": "secret"}, "b/codes": {"token": "secret"}}


@pytest.mark.parametrize("config", ["{", "null", '{"format_version": 2, "device": "cuda"}'])
def test_a_foreign_config_is_refused_in_one_line(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"config\.json"):
        MVARPipeline.from_pretrained(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match=r"config\.json is not a regular file"):
        MVARPipeline.from_pretrained(folder)


def test_an_unavailable_device_is_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="warp is not available"):
        MVARPipeline(TrainedModel(tiny_network(), tokenizer, NAMES), device="warp")
