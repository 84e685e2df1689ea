"""Conversion of published state dicts to ours and back, and the errors for other state dicts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MIXERS, tiny_network
from published_states import CASES, published

from lightning_mvar import MVAR, MVARConfig, ScaleSchedule, Tokenizer, TokenizerConfig
from lightning_mvar.checkpoints import (
    load_official,
    load_official_mvar,
    load_trained,
    save_folder,
    save_official,
)
from lightning_mvar.checkpoints.published import (
    BUFFERS,
    network_config,
    network_from_published,
    network_to_published,
    tokenizer_from_published,
    tokenizer_to_published,
    without_buffers,
)
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import read_torch

SCHEDULE = ScaleSchedule((1, 2, 3, 4))


def assert_bit_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts equal keys and shapes, and equal values of the weights and of the scale of each token."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].shape == tensor.shape, key
        assert actual[key].dtype == tensor.dtype or key.endswith("patch_nums"), key  # the recipe's are float
        if key == "lvl_1L" or not key.endswith(BUFFERS):
            assert torch.equal(actual[key], tensor), key


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_is_bit_exact(case: str, tmp_path: Path) -> None:
    """Published files -> our folder -> published files, through the disk."""
    network, tokenizer = published(case)
    torch.save(network, tmp_path / "network.pth")
    torch.save(tokenizer, tmp_path / "tokenizer.pth")
    model = load_official(tmp_path / "network.pth", tmp_path / "tokenizer.pth")
    save_folder(tmp_path / "ours", model.tokenizer, model.network, model.class_names)
    files = save_official(tmp_path / "back", load_trained(tmp_path / "ours"))
    kind = "mvar" if "mvar" in case else "var"
    assert [path.name for path in files] == [f"{kind}_d2.pth", "vae_ch32v64z32.pth"]
    for path, state in zip(files, (network, tokenizer), strict=True):
        assert_bit_equal(read_torch(path), state)


@pytest.mark.parametrize("kind", MIXERS)
def test_the_buffers_that_the_published_code_expects(kind: str) -> None:
    """VAR masks the keys of finer scales; M-VAR masks all other scales and stores the tokens per scale."""
    mamba = {"head_dim": 64} if kind == "mvar" else {}  # VAR has no Mamba branch: its fields are unused
    state = network_to_published(tiny_network(mixers=MIXERS[kind], **mamba))
    scale = SCHEDULE.scale_ids.tolist()
    visible = {"mvar": lambda query, key: query == key, "var": lambda query, key: query >= key}[kind]
    expected = [[0.0 if visible(query, key) else -torch.inf for key in scale] for query in scale]
    assert torch.equal(state["attn_bias_for_masking"], torch.tensor(expected)[None, None])
    assert not state["blocks.0.attn.zero_k_bias"].any()
    lengths = state.get("blocks.1.attn.patch_nums")
    assert lengths is None if kind == "var" else (lengths.tolist(), lengths.dtype) == ([1, 4, 9, 16], torch.int32)
    state["lvl_1L"].zero_()
    assert SCHEDULE.scale_ids.tolist() == scale  # the state dict holds a copy


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"mixers": MIXERS["var"]},
        {"mixers": MIXERS["var"], "shared_adaln": True},
        {"qk_norm": False, "heads": 1},
        {"schedule": ScaleSchedule((2, 3)), "depth": 11, "num_classes": 7, "vocab_size": 31, "code_dim": 5},
    ],
)
def test_the_configuration_is_read_back(variant: dict) -> None:
    schedule = variant.pop("schedule", SCHEDULE)
    base = {"depth": 2, "width": 64, "heads": 2, "vocab_size": 48, "code_dim": 8, "num_classes": 10}
    config = MVARConfig(schedule, **(base | variant))
    assert network_config(network_to_published(MVAR(config))) == config


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            {"mixers": ("mamba2",), "qk_norm": False},
            r"mixers are mamba2, must be scale_attention, mamba2 \(M-VAR\) or block_causal_attention \(VAR\); heads",
        ),
        ({"state_dim": 16}, "state_dim is 16, must be 64"),
        ({"parallel": True}, "parallel is True, must be False"),
        ({"scan_order": "column"}, "scan_order is column, must be raster"),
        ({"mixers": ("block_causal_attention",), "prediction": "token"}, "prediction is token, must be scale"),
        ({"mixers": (("scale_attention", "mamba2"), ())}, "mixers are scale_attention, mamba2 / none"),
        ({"qk_norm": False}, "heads have dim 32, must have 64 without qk_norm"),
        ({"shared_adaln": True}, "shared_adaln is True, must be False"),
        ({"state_dim": 16, "expand": 1}, "state_dim is 16, must be 64; expand is 1, must be 2"),
    ],
)
def test_networks_that_the_published_code_does_not_support_are_refused(variant: dict, message: str) -> None:
    config = {"head_dim": 64} | variant
    with pytest.raises(InputError, match=message):
        network_to_published(tiny_network(**config))


def test_tokenizers_that_the_published_code_does_not_support_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"multipliers is \(1, 2\), must be \(1, 1, 2, 2, 4\)"):
        tokenizer_to_published(tokenizer)
    with pytest.raises(InputError, match="channels are 24, must be a multiple of 32"):
        tokenizer_to_published(Tokenizer(TokenizerConfig(SCHEDULE, 16, 8, channels=24)))


def without(state: dict, key: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: t, "not have the keys of a published VAR or M-VAR network; it looks like a tokenizer"),
        (lambda n, t: without(n, "blocks.1.ffn.fc2.bias"), r"missing blocks\.1\.ffn\.fc2\.bias$"),
        (lambda n, t: n | {"extra": torch.zeros(1)}, "unexpected extra$"),
        (lambda n, t: without(n, "blocks.0.mamba.norm.weight"), r"it has no 'blocks\.0\.mamba\.norm\.weight'"),
        (lambda n, t: n | {"head.weight": torch.zeros(64, 9)}, r"head\.weight is \(64, 9\), not \(64, 128\)$"),
        (
            lambda n, t: n | {"lvl_1L": n["lvl_1L"][:, :-5]},
            r"must be positive and strictly increasing, got \(1, 2, 3, 3\)",
        ),
        (lambda n, t: n | {"lvl_1L": torch.tensor([[0, 1, 1, 1, 1]])}, r"pos_1LC is \(1, 30, 128\), not \(1, 5, 128\)"),
        (
            lambda n, t: n | {"lvl_1L": torch.tensor([[0, -1]])},
            "lvl_1L numbers the scales from -1 to 0, but there are 4 scale embeddings",
        ),
        (
            lambda n, t: n | {"lvl_1L": torch.tensor([[0, 10**13]])},
            "lvl_1L numbers the scales from 0 to 10000000000000",
        ),
        (lambda n, t: n | {"head.weight": torch.tensor(1.0)}, "0-d tensor"),
        (lambda n, t: n | {"word_embed.weight": torch.zeros(3)}, "not a complete VAR or M-VAR network"),
        (lambda n, t: {k: v for k, v in n.items() if ".mamba." not in k}, r"ada_lin\.1\.weight is .* and 1 more"),
    ],
)
def test_errors_for_incomplete_networks_name_the_difference(change, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        network_from_published(change(*published("mvar_small")), "net.pth")
    assert str(raised.value).startswith("net.pth ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, t: n, "not have the keys of a published tokenizer; it looks like a network"),
        (lambda n, t: without(t, "decoder.conv_out.bias"), r"missing decoder\.conv_out\.bias$"),
        (lambda n, t: without(t, "encoder.down.1.block.0.conv1.weight"), "it has no 'encoder.down.1.block.0.conv1"),
        (lambda n, t: t | {"quantize.embedding.weight": torch.zeros(3)}, r"vae\.pth is not a complete tokenizer"),
        (lambda n, t: t | {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, r"vae\.pth is not a complete tokenizer"),
        (
            lambda n, t: {k: v for k, v in t.items() if "qresi" not in k},
            r"vae\.pth is not a complete tokenizer \(.*num_phi",
        ),
        (lambda n, t: t | {"teacher.weight": torch.zeros(1)}, r"unexpected teacher\.weight$"),
    ],
)
def test_errors_for_incomplete_tokenizers_name_the_difference(change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokenizer_from_published(change(*published("mvar_small")), SCHEDULE, "vae.pth")


def test_a_tokenizer_of_another_codebook_is_refused(tmp_path: Path) -> None:
    network, tokenizer = published("var_small")
    torch.save({"trainer": {"var_wo_ddp": network, "vae_local": tokenizer}}, tmp_path / "both.pth")
    assert load_official(tmp_path / "both.pth").tokenizer.config.vocab_size == 64
    config = TokenizerConfig(SCHEDULE, 48, 32, channels=32)
    torch.save(tokenizer_to_published(Tokenizer(config)), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth does not fit the network: vocab_size is 48 there, 64 in"):
        load_official(tmp_path / "both.pth", tmp_path / "other.pth")


def test_nothing_is_shared_with_the_source(tmp_path: Path) -> None:
    """Loaded weights share memory with no state dict, no mapped file and no other parameter."""
    state, _ = published("var_small")
    torch.save(state, tmp_path / "net.pth")
    loaded = load_official_mvar(tmp_path / "net.pth")
    (tmp_path / "net.pth").open("r+b").truncate(1000)
    assert torch.equal(loaded.head.weight, state["head.weight"])
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    tied = load_official_mvar(state | {"blocks.0.attn.v_bias": state["blocks.0.attn.q_bias"]})
    with torch.no_grad():
        tied.blocks[0].mixers[0].q_bias.zero_()
    assert tied.blocks[0].mixers[0].v_bias.any()


def test_the_callers_state_dict_is_unchanged() -> None:
    state, _ = published("var_small")
    with torch.no_grad():
        load_official_mvar(state).head.weight.zero_()
    assert state["head.weight"].any()
    assert "lvl_1L" not in without_buffers(state)
