"""Parity with the published code, for weights computed by tests/parity/recipe.py (see tests/parity/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from parity.recipe import image
from published_states import CASES, FOLDER, official_weights

from lightning_mvar import MVAR, ScaleSchedule, Tokenizer, generate
from lightning_mvar.checkpoints import load_official_mvar, load_official_tokenizer
from lightning_mvar.checkpoints.published import NETWORK_NAMES, rename

TOLERANCE = 1e-4  # of the largest magnitude
GRADIENT_TOLERANCE = 1e-3
# Under autocast: two to three times the largest observed difference, relative to the largest magnitude.
HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3}  # logits and loss
HALF_GRADIENTS = {torch.bfloat16: 5e-2, torch.float16: 2e-2}
WITH_IMAGES = pytest.mark.parametrize("case", ["mvar_small"], indirect=True)  # whose tokenizer is that of all cases
HALF_IMAGES = {torch.bfloat16: 2e-1, torch.float16: 3e-2}  # deep convolutions with random weights amplify differences


@dataclass
class Case:
    reference: dict[str, Any]
    values: dict[str, torch.Tensor]
    network: MVAR
    tokenizer: Tokenizer


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    reference = json.loads((FOLDER / f"{request.param}.json").read_text())
    with np.load(FOLDER / f"{request.param}.npz") as arrays:
        values = {name: torch.from_numpy(arrays[name]) for name in arrays}
    schedule = ScaleSchedule(tuple(reference["config"]["patch_nums"]))
    tokenizer_keys = json.loads((FOLDER / "mvar_small.json").read_text())["vqvae_keys"]
    return Case(
        reference,
        {name: value.long() if value.dtype == torch.int32 else value for name, value in values.items()},
        load_official_mvar(official_weights(reference["official_keys"], schedule)),
        load_official_tokenizer(official_weights(tokenizer_keys, schedule), schedule),
    )


def assert_agrees(case: Case, name: str, actual: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    expected = case.values[name]
    difference = float((actual.detach().cpu() - expected).abs().max() / expected.abs().max())
    print(f"parity: {name:<24} {difference:.1e}")
    assert difference <= tolerance, name


def assert_gradients_agree(case: Case, tolerance: float, scale: float = 1.0) -> None:
    parameters, worst = dict(case.network.named_parameters()), 0.0
    for key, norm in case.reference["grad_norms"].items():
        gradient = parameters[rename(key, NETWORK_NAMES)].grad
        assert gradient is not None, key
        worst = max(worst, abs(float(gradient.norm()) / scale / norm - 1))
        assert worst <= tolerance, key
    print(f"parity: {'gradient norms':<24} {worst:.1e}")


def test_the_configuration_is_read_off_the_weights(case: Case) -> None:
    expected, config = case.reference["config"], case.network.config
    assert sum(p.numel() for p in case.network.parameters()) == case.reference["parameters"]
    assert (config.depth, config.width, config.heads) == (expected["depth"], expected["width"], expected["heads"])
    assert (config.num_classes, config.vocab_size) == (expected["classes"], expected["vocab"])
    assert config.qk_norm == expected["attn_l2_norm"]
    assert config.schedule.side_lengths == tuple(expected["patch_nums"])


@WITH_IMAGES
@torch.no_grad()
def test_tokenizer_agrees(case: Case) -> None:
    config = case.reference["config"]
    images = torch.from_numpy(image(config["batch"], 16 * config["patch_nums"][-1], config["seed"]))
    assert_agrees(case, "encoder_features", case.tokenizer.features(images))
    tokens = case.tokenizer.encode(images)
    assert torch.equal(tokens, case.values["tokens"])
    assert_agrees(case, "f_hat", case.tokenizer.quantizer.decode(tokens))
    assert_agrees(case, "reconstruction", case.tokenizer.decode(tokens))


def test_loss_and_gradients_agree(case: Case) -> None:
    tokens = case.values["tokens"]
    scale_inputs = case.tokenizer.scale_inputs(tokens)
    assert_agrees(case, "teacher_forcing_input", scale_inputs)
    logits = case.network(case.values["labels"], scale_inputs)
    assert_agrees(case, "logits", logits)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert_agrees(case, "loss", loss)
    case.network.zero_grad()
    loss.backward()
    assert_gradients_agree(case, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.filterwarnings("error::UserWarning")
def test_half_precision_stays_near(case: Case, dtype: torch.dtype) -> None:
    """Compares logits, loss and gradients under autocast, with the loss scaling that float16 needs."""
    tokens, scale = case.values["tokens"], 1024.0
    with torch.autocast("cpu", dtype=dtype):
        logits = case.network(case.values["labels"], case.tokenizer.scale_inputs(tokens))
    assert logits.dtype == torch.float32
    assert_agrees(case, "logits", logits, HALF[dtype])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert_agrees(case, "loss", loss, HALF[dtype])
    case.network.zero_grad()
    (loss * scale).backward()
    assert_gradients_agree(case, HALF_GRADIENTS[dtype], scale)


@WITH_IMAGES
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_a_half_precision_tokenizer_stays_near(case: Case, dtype: torch.dtype) -> None:
    """Compares features and reconstruction; tokens may differ if two codes are almost equally near."""
    config, tokens = case.reference["config"], case.values["tokens"]
    images = torch.from_numpy(image(config["batch"], 16 * config["patch_nums"][-1], config["seed"]))
    with torch.autocast("cpu", dtype=dtype):
        features = case.tokenizer.features(images)
        assert_agrees(case, "encoder_features", features.float(), HALF_IMAGES[dtype])
        assert_agrees(case, "reconstruction", case.tokenizer.decode(tokens).float(), HALF_IMAGES[dtype])
        assert (case.tokenizer.quantizer.encode(features) == tokens).float().mean() > 0.9


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_half_precision_sampling_mostly_draws_the_same_tokens(case: Case, dtype: torch.dtype) -> None:
    """Compares greedy tokens; a near tie that is resolved differently changes all later tokens of its image."""
    settings = {"guidance": case.reference["config"]["cfg"], "top_k": 1, "top_p": 1.0}
    with torch.autocast("cpu", dtype=dtype):
        _, tokens = generate(case.network, case.tokenizer, case.values["labels"], return_tokens=True, **settings)
    assert (tokens == case.values["greedy_tokens"]).float().mean() > 0.8


def test_greedy_sampling_agrees(case: Case) -> None:
    settings = {"guidance": case.reference["config"]["cfg"], "top_k": 1, "top_p": 1.0}
    images, tokens = generate(case.network, case.tokenizer, case.values["labels"], return_tokens=True, **settings)
    assert torch.equal(tokens, case.values["greedy_tokens"])
    if "greedy_image" in case.values:
        assert_agrees(case, "greedy_image", images)


@pytest.fixture
def case_on_gpu(case: Case) -> Iterator[Case]:
    case.network.cuda()
    case.tokenizer.cuda()
    yield case
    case.network.cpu()
    case.tokenizer.cpu()


@pytest.mark.cuda
def test_a_gpu_agrees_in_float32(case_on_gpu: Case) -> None:
    """Compares tokenizer, loss, gradients and greedy sampling, all with products in float32."""
    case, config = case_on_gpu, case_on_gpu.reference["config"]
    if "encoder_features" in case.values:
        images = torch.from_numpy(image(config["batch"], 16 * config["patch_nums"][-1], config["seed"])).cuda()
        assert_agrees(case, "encoder_features", case.tokenizer.features(images))
        assert torch.equal(case.tokenizer.encode(images).cpu(), case.values["tokens"])
        assert_agrees(case, "reconstruction", case.tokenizer.decode(case.values["tokens"].cuda()))
    tokens, labels = case.values["tokens"].cuda(), case.values["labels"]
    logits = case.network(labels.cuda(), case.tokenizer.scale_inputs(tokens))
    assert_agrees(case, "logits", logits)
    case.network.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert_gradients_agree(case, GRADIENT_TOLERANCE)
    settings = {"guidance": config["cfg"], "top_k": 1, "top_p": 1.0}
    _, drawn = generate(case.network, case.tokenizer, labels, return_tokens=True, **settings)
    assert torch.equal(drawn.cpu(), case.values["greedy_tokens"])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_gpu_stays_near_in_half_precision(case_on_gpu: Case, dtype: torch.dtype) -> None:
    case, tokens, scale = case_on_gpu, case_on_gpu.values["tokens"].cuda(), 1024.0
    scale_inputs = case.tokenizer.scale_inputs(tokens)
    with torch.autocast("cuda", dtype=dtype):
        logits = case.network(case.values["labels"].cuda(), scale_inputs)
    assert_agrees(case, "logits", logits, HALF[dtype])
    case.network.zero_grad()
    (torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) * scale).backward()
    assert_gradients_agree(case, HALF_GRADIENTS[dtype], scale)
