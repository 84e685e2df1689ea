"""Where float32 products may be rounded to TF32; a CPU never does so, hence the tests read PyTorch's flags."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Brightness, Pixels, write_token_shards
from lit_modules import make_module, make_trainer
from torch import nn

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.images.examples import ImageBatch
from lightning_mvar.data.tokens.encode import TokenEncoder
from lightning_mvar.devices import exact_float32, set_tf32
from lightning_mvar.metrics.summary import Features
from lightning_mvar.sampling.draw import Rejection
from lightning_mvar.training.datamodules import TokenDataModule


def tf32() -> bool:
    """Whether convolutions and matrix products of float32 may use TF32, which must agree."""
    convolutions = torch.backends.cudnn.allow_tf32
    assert convolutions == torch.backends.cuda.matmul.allow_tf32 == (torch.get_float32_matmul_precision() == "high")
    return convolutions


class Recorder(nn.Module):
    """Records `tf32()` in each forward pass of modules."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.seen: list[bool] = []
        for module in modules:
            module.register_forward_hook(lambda *_: self.seen.append(tf32()))


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    """Restores PyTorch's own."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_a_command_begins_without_tf32(capsys: pytest.CaptureFixture[str]) -> None:
    set_tf32(True)
    assert tf32()
    assert run(["export", ".", "--out", "out"]) == 1
    assert not tf32()


def test_exact_products_are_a_matter_of_their_block() -> None:
    set_tf32(True)
    with exact_float32():
        assert not tf32()
    assert tf32()


def test_exact_products_of_overlapping_threads_stay_exact_and_leave_the_setting() -> None:
    set_tf32(True)
    first, second = exact_float32(), exact_float32()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # before the second, as in two threads
    assert not tf32()
    second.__exit__(None, None, None)
    assert tf32()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_tokens_are_encoded_in_the_given_precision_and_chosen_in_float32(
    tokenizer: Tokenizer, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = deepcopy(tokenizer)  # the encoder casts its weights, and other tests share the tokenizer
    encoder, argmin = [], []
    tokenizer.encoder.conv_in.register_forward_hook(lambda *_: encoder.append(tf32()))
    smallest = torch.Tensor.argmin
    monkeypatch.setattr(torch.Tensor, "argmin", lambda self, **k: argmin.append(tf32()) or smallest(self, **k))
    set_tf32(True)
    batch = ImageBatch(torch.zeros(1, 3, *tokenizer.config.shape), torch.zeros(1, dtype=torch.int64), ["a"], [], [])
    list(TokenEncoder(tokenizer, torch.device("cpu"), precision)([batch]))
    assert encoder == [precision == "tf32"]
    assert argmin == [False] * tokenizer.config.schedule.num_scales


def test_features_of_images_are_computed_in_float32() -> None:
    set_tf32(True)
    extractor = Pixels()
    recorder = Recorder(extractor)
    Features(extractor, 2, 0).update(torch.rand(2, 3, 8, 8), torch.arange(2))
    assert recorder.seen == [False]


def test_rejection_judges_images_in_float32() -> None:
    set_tf32(True)
    classifier = Brightness()
    recorder = Recorder(classifier)
    Rejection(classifier, 0.5).probabilities(np.zeros((1, 8, 8, 3), np.uint8))
    assert recorder.seen == [False]


def test_training_may_use_tf32_but_not_in_what_it_reads_from_tokens(
    tokenizer_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_token_shards(tmp_path, tokenizer.fingerprint(), [20])
    set_tf32(True)
    module = make_module(tokenizer_folder)
    module.configure_model()
    network, phi = Recorder(module.network.blocks[0]), Recorder(*module.tokenizer.quantizer.phi)
    data = TokenDataModule(str(tmp_path), str(tmp_path), batch_size=10)
    make_trainer(tmp_path, 1, limit_val_batches=0).fit(module, data)
    assert set(network.seen) == {True}
    assert set(phi.seen) == {False}
