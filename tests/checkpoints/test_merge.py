"""Linear combinations of networks from every kind of file, compared with sums in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import tiny_network
from published_states import published
from torch import Tensor

from lightning_mvar import MVAR, Tokenizer
from lightning_mvar.checkpoints import load_official, load_trained, open_trained, save_folder
from lightning_mvar.checkpoints.merge import Term, merge
from lightning_mvar.checkpoints.training import (
    NETWORK_KEY,
    NetworkRecord,
    RunRecord,
    TokenizerRecord,
    publish,
    size_and_crc,
)
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import save_lazily, save_weights

Names = list[str]


def moved(network: MVAR, seed: int) -> MVAR:
    """Adds noise to the weights of a network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def save_checkpoint(path: Path, network: MVAR, ema: MVAR, tokenizer: Tokenizer, folder: Path, names: Names) -> None:
    """Writes what `fit` writes, or its shards if the name ends with `sharded.ckpt`."""
    where = TokenizerRecord(str(folder), tokenizer.fingerprint())
    record = {NETWORK_KEY: asdict(NetworkRecord(network.config, where, names, RunRecord(True, (0, 0), 1, 4, 0.9)))}
    weights = {f"network.{name}": tensor.detach() for name, tensor in network.state_dict().items()}
    weights |= {f"ema.{name}": tensor.detach() for name, tensor in ema.state_dict().items()}
    if not path.name.endswith("sharded.ckpt"):
        torch.save({"state_dict": weights, **record}, path)
        return
    unfinished = path.with_name("unfinished")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state_dict": weights}, checkpoint_id=unfinished, no_dist=True)
    torch.save(record, unfinished / "meta.pt")
    publish(unfinished, path, {file.name: size_and_crc(file) for file in unfinished.iterdir()})


def expected_sum(terms: list[tuple[float, MVAR]]) -> dict[str, Tensor]:
    states = [(coefficient, network.state_dict()) for coefficient, network in terms]
    return {name: sum(c * state[name].double() for c, state in states).float() for name in states[0][1]}


def require_equal(actual: MVAR, expected: dict[str, Tensor]) -> None:
    assert actual.state_dict().keys() == expected.keys()
    for name, tensor in actual.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_networks_of_every_kind_of_file_give_their_weighted_sum(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    networks = [moved(tiny_network(drop_path=0.1 * seed), seed) for seed in range(4)]
    save_folder(tmp_path / "export", tokenizer, networks[0])
    names = [f"class {label}" for label in range(10)]
    save_checkpoint(tmp_path / "a.ckpt", networks[1], networks[2], tokenizer, tokenizer_folder, names)
    save_checkpoint(tmp_path / "sharded.ckpt", networks[2], networks[3], tokenizer, tokenizer_folder, names)
    opened = [
        open_trained(tmp_path / "export"),
        open_trained(tmp_path / "a.ckpt", weights="raw"),
        open_trained(tmp_path / "a.ckpt"),
        open_trained(tmp_path / "sharded.ckpt"),
    ]
    factors = [0.5, -1.25, 0.75, 2.0]
    merge([Term(*term) for term in zip(factors, opened, strict=True)], tmp_path / "out")
    merged = load_trained(tmp_path / "out")
    require_equal(merged.network, expected_sum(list(zip(factors, networks, strict=True))))
    assert merged.network.config == networks[0].config
    assert merged.class_names == names
    assert merged.tokenizer.fingerprint() == tokenizer.fingerprint()
    record = json.loads((tmp_path / "out/config.json").read_text())["merged"]
    assert [(term["part"], term["coefficient"]) for term in record] == list(
        zip(["network", "network", "ema", "ema"], factors, strict=True)
    )


def test_published_files_merge_with_folders(tmp_path: Path) -> None:
    state, vae = published("mvar_small")
    torch.save(state, tmp_path / "network.pth")
    torch.save(vae, tmp_path / "vae.pth")
    model = load_official(tmp_path / "network.pth", tmp_path / "vae.pth")
    other = moved(load_official(tmp_path / "network.pth", tmp_path / "vae.pth").network, 1)
    save_folder(tmp_path / "other", model.tokenizer, other)
    opened = [open_trained(tmp_path / "network.pth", tmp_path / "vae.pth"), open_trained(tmp_path / "other")]
    merge([Term(2.0, opened[0]), Term(-1.0, opened[1])], tmp_path / "out")
    require_equal(load_trained(tmp_path / "out").network, expected_sum([(2.0, model.network), (-1.0, other)]))


def test_one_network_is_written_as_export_writes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    network = tiny_network()
    save_folder(tmp_path / "export", tokenizer, network)
    merge([Term(1.0, open_trained(tmp_path / "export"))], tmp_path / "out")
    for name in ("network.safetensors", "tokenizer.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
    shapes = {name: tensor.to("meta") for name, tensor in network.state_dict().items()}
    save_lazily(shapes, network.state_dict().__getitem__, tmp_path / "lazy")
    save_weights(network, tmp_path / "weights")
    assert (tmp_path / "lazy").read_bytes() == (tmp_path / "weights").read_bytes()


def test_only_an_own_result_is_replaced(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        save_folder(tmp_path / name, tokenizer, moved(tiny_network(), seed))
    terms = [Term(0.5, open_trained(tmp_path / name)) for name in ("a", "b")]
    merge(terms, tmp_path / "out")
    (tmp_path / "out/network.safetensors").write_bytes(b"")
    merge(terms, tmp_path / "out")
    written = (tmp_path / "out/network.safetensors").read_bytes()
    for out in ("out", "a"):
        with pytest.raises(InputError, match=f"{out} holds another network or a tokenizer: name another --out"):
            merge(terms[:1], tmp_path / out)
    assert (tmp_path / "out/network.safetensors").read_bytes() == written


def other_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    torch.manual_seed(5)
    return Tokenizer(tokenizer.config).eval()


def without_bias(network: MVAR) -> MVAR:
    del network.head.bias
    return network


def with_nan(network: MVAR) -> MVAR:
    network.head.weight.data[0, 0] = torch.nan
    return network


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t, tiny_network(depth=3), []), r"b differs from \S+a: depth is 3 there, 2 in the first"),
        (lambda t: (t, tiny_network(num_classes=9), []), "num_classes is 9 there, 10 in the first"),
        (lambda t: (t, tiny_network(), [*"0123456798"]), "other classes than .*: class 8 is '9' there, '8' in the"),
        (lambda t: (other_tokenizer(t), tiny_network(), []), r"b has another tokenizer than \S+a: .* cannot be merged"),
        (lambda t: (t, without_bias(tiny_network()), []), "b does not fit MVAR: missing head.bias"),
        (lambda t: (t, with_nan(tiny_network()), []), "b holds NaN or infinite values in head.weight"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(
    tokenizer: Tokenizer,
    tmp_path: Path,
    change: Callable[[Tokenizer], tuple[Tokenizer, MVAR, Names]],
    message: str,
) -> None:
    save_folder(tmp_path / "a", tokenizer, tiny_network(), [*"0123456789"])
    save_folder(tmp_path / "b", *change(tokenizer))
    with pytest.raises(InputError, match=message):
        merge([Term(0.5, open_trained(tmp_path / name)) for name in ("a", "b")], tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()
    assert not list((tmp_path / "out").glob("*network*"))


def test_coefficients_that_overflow_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_folder(tmp_path / "a", tokenizer, tiny_network())
    with pytest.raises(InputError, match=r"is not finite in the merged network: its coefficients 1e\+39 are too large"):
        merge([Term(1e39, open_trained(tmp_path / "a"))], tmp_path / "out")
