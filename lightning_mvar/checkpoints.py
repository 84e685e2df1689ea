"""Weights in and out: our folder (safetensors + config.json), training checkpoints, and the published files.

A folder holds `config.json` and `network.safetensors`, `tokenizer.safetensors` or both. `config.json` is written last,
so a folder that has one is complete. Nothing here ever executes code from a file: foreign files are read with
`weights_only=True` or as safetensors.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mvar.errors import InputError
from lightning_mvar.files import atomic_path
from lightning_mvar.models.mvar import MVAR, MVARConfig
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

StateDict = dict[str, Tensor]
Config = TypeVar("Config", MVARConfig, TokenizerConfig)
Module = TypeVar("Module", bound=nn.Module)

CHECKPOINT_KEY = "lightning_mvar"  # where a training checkpoint keeps what is needed to rebuild its network
NETWORK_PREFIX = "network."


@dataclass
class TrainedModel:
    """All that sampling takes: both parts in eval mode on the CPU, and the names of the classes."""

    network: MVAR
    tokenizer: Tokenizer
    class_names: list[str]


# --- Our folder and training checkpoints --------------------------------------------------------------------------


def save_folder(
    folder: str | Path,
    tokenizer: Tokenizer,
    network: MVAR | None = None,
    class_names: list[str] | None = None,
) -> None:
    """Write a tokenizer, or a network with its tokenizer, as one self-contained folder."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder} is a file; name a folder to write to")
    (folder / "config.json").unlink(missing_ok=True)
    config: dict[str, Any] = {"format_version": 1, "tokenizer": asdict(tokenizer.config)}
    save_weights(tokenizer, folder / "tokenizer.safetensors")
    if network is not None:
        config |= {"network": asdict(network.config), "class_names": class_names or []}
        save_weights(network, folder / "network.safetensors")
    with atomic_path(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n")


def save_weights(module: nn.Module, path: Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that `train-tokenizer` or `export` wrote, in eval mode."""
    config = read_config(Path(folder), "tokenizer", "train one with `lightning-mvar train-tokenizer`")
    tokenizer = Tokenizer(config_from_dict(TokenizerConfig, config["tokenizer"], folder))
    return load_strictly(tokenizer, read_weights(Path(folder) / "tokenizer.safetensors"), folder)


def load_trained(path: str | Path, tokenizer: str | Path | None = None) -> TrainedModel:
    """What `sample` and `evaluate` take: a training checkpoint, or a folder that `export` wrote.

    Args:
        path: the file or folder.
        tokenizer: folder of the tokenizer, where it is no longer at the path that the checkpoint remembers.

    Raises:
        InputError: if the file is missing or not ours, or its tokenizer is missing or another one.
    """
    path = Path(path)
    if path.is_dir():
        config = read_config(path, "network", "write one with `lightning-mvar export`")
        network = MVAR(config_from_dict(MVARConfig, config["network"], path))
        load_strictly(network, read_weights(path / "network.safetensors"), path)
        return TrainedModel(network, load_tokenizer(tokenizer or path), config["class_names"])
    checkpoint = read_torch(path, mmap=True)
    if CHECKPOINT_KEY not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of `lightning-mvar fit`")
    about = checkpoint[CHECKPOINT_KEY]
    network = MVAR(config_from_dict(MVARConfig, about["network"], path))
    weights = {k.removeprefix(NETWORK_PREFIX): v for k, v in checkpoint["state_dict"].items()}
    load_strictly(network, weights, path)
    loaded = load_tokenizer(tokenizer or about["tokenizer"]["path"])
    if (fingerprint := loaded.fingerprint()) != about["tokenizer"]["fingerprint"]:
        raise InputError(
            f"{path} was trained with tokenizer {about['tokenizer']['fingerprint']}, but "
            f"{tokenizer or about['tokenizer']['path']} holds {fingerprint}: name the right one with --tokenizer"
        )
    return TrainedModel(network, loaded, about["class_names"])


def describe(network: MVARConfig, tokenizer: str, fingerprint: str, class_names: list[str]) -> dict[str, Any]:
    """What a training checkpoint stores under `CHECKPOINT_KEY`, for `load_trained`; plain types only."""
    return {
        "network": asdict(network),
        "tokenizer": {"path": tokenizer, "fingerprint": fingerprint},
        "class_names": class_names,
    }


def config_from_dict(cls: type[Config], values: dict[str, Any], source: str | Path) -> Config:
    """A config from what `asdict` made of it."""
    try:
        return cls(**(values | {"schedule": ScaleSchedule(**values["schedule"])}))
    except (TypeError, KeyError) as error:
        raise InputError(f"{source}: not a {cls.__name__} of this version ({error})") from error


def read_config(folder: Path, part: str, remedy: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: not a finished {part} folder; {remedy}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from error
    if part not in config:
        raise InputError(f"{path} describes no {part}; {remedy}")
    return config


def read_weights(path: Path) -> StateDict:
    """A flat state dict from .safetensors."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from error


def read_torch(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What `torch.save` wrote, without running any code from the file; with `mmap`, tensors are read when used."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; it must be a checkpoint file or a folder that `export` wrote")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or not a file of plain weights ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def load_strictly(module: Module, weights: Mapping[str, Tensor], source: str | Path) -> Module:
    """Load `weights` into `module`, all of them and no others, and put it in eval mode."""
    own = module.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unexpected {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(weights)
    return module.eval()


# --- The published files ------------------------------------------------------------------------------------------

OFFICIAL_BUFFERS = ("zero_k_bias", "patch_nums", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")  # not learned

NETWORK_NAMES = [  # (pattern in an official key, our name)
    (r"^pos_start$", "start_embed"),
    (r"^pos_1LC$", "pos_embed"),
    (r"^lvl_embed\.", "scale_embed."),
    (r"^class_emb\.", "class_embed."),
    (r"^word_embed\.", "input_proj."),
    (r"^shared_ada_lin\.1\.", "shared_adaln."),
    (r"^head_nm\.ada_lin\.1\.", "head_adaln."),
    (r"\.ada_gss$", ".adaln_table"),
    (r"\.ada_lin\.1\.", ".adaln."),
    (r"\.attn\.scale_mul_1H11$", ".mixers.0.qk_scale_log"),
    (r"\.attn\.mat_qkv\.", ".mixers.0.qkv."),
    (r"\.attn\.", ".mixers.0."),
    (r"\.mamba\.", ".mixers.1."),
    (r"\.ffn\.fc1\.", ".mlp.0."),
    (r"\.ffn\.fc2\.", ".mlp.2."),
]

TOKENIZER_NAMES = [
    (r"^quantize\.embedding\.", "quantizer.codebook."),
    (r"^quantize\.quant_resi\.qresi_ls\.", "quantizer.phi."),
    (r"\.(?:down|up)\.(\d+)\.block\.", r".levels.\1.blocks."),
    (r"\.(?:down|up)\.(\d+)\.attn\.", r".levels.\1.attentions."),
    (r"\.(?:down|up)\.(\d+)\.(?:down|up)sample\.conv\.", r".levels.\1.resample."),
    (r"\.mid\.block_1\.", ".middle.0."),
    (r"\.mid\.attn_1\.", ".middle.1."),
    (r"\.mid\.block_2\.", ".middle.2."),
    (r"\.nin_shortcut\.", ".skip."),
    (r"\.proj_out\.", ".proj."),
]


def load_official_mvar(source: str | Path | Mapping[str, Tensor]) -> MVAR:
    """A published VAR or M-VAR network, in eval mode; its configuration is read off keys and shapes.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of a published network.
    """
    state, name = official_state(source, "network")
    if not {"lvl_1L", "pos_1LC", "word_embed.weight", "head.weight"} <= state.keys():
        raise InputError(f"{name} has not the keys of a published VAR or M-VAR network")
    try:
        config = official_mvar_config(state, name)
    except KeyError as error:
        raise InputError(f"{name} is not a whole VAR or M-VAR network: it has no {error}") from error
    weights = rename(state, NETWORK_NAMES)
    for key in weights:
        if key.endswith("qk_scale_log"):
            weights[key] = weights[key].flatten()
    return load_strictly(MVAR(config), weights, name)


def official_mvar_config(state: StateDict, name: str) -> MVARConfig:
    """Every field of the configuration from the shapes of an official state dict."""
    width, code_dim = state["word_embed.weight"].shape
    counts = torch.bincount(state["lvl_1L"].flatten().long())
    scale_mul, A_log = (state.get(f"blocks.0.{key}") for key in ("attn.scale_mul_1H11", "mamba.A_log"))
    mamba: dict[str, Any] = {}
    if A_log is not None:
        inner, heads = len(state["blocks.0.mamba.norm.weight"]), len(A_log)
        mamba["mamba_state_dim"] = (len(state["blocks.0.mamba.in_proj.weight"]) - 2 * inner - heads) // 2
        mamba["mamba_conv_width"] = state["blocks.0.mamba.conv1d.weight"].shape[-1]
        mamba["mamba_expand"], mamba["mamba_head_dim"] = inner // width, inner // heads
    return MVARConfig(
        schedule=ScaleSchedule(tuple(round(n**0.5) for n in counts.tolist())),
        depth=1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m), default=0),
        width=width,
        heads=width // 64 if scale_mul is None else scale_mul.numel(),
        vocab_size=len(state["head.weight"]),
        code_dim=code_dim,
        num_classes=len(state["class_emb.weight"]) - 1,
        mixers=("block_causal_attention",) if A_log is None else ("scale_attention", "mamba2"),
        qk_norm=scale_mul is not None,
        shared_adaln="shared_ada_lin.1.weight" in state,
        **mamba,
    )


def load_official_tokenizer(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule) -> Tokenizer:
    """The published tokenizer, in eval mode; its configuration is read off shapes, except the schedule.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.
        schedule: the scales to use it with; the weights do not tell.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of the published tokenizer.
    """
    state, name = official_state(source, "tokenizer")
    if not {"quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"} <= state.keys():
        raise InputError(f"{name} has not the keys of a published tokenizer")
    vocab_size, code_dim = state["quantize.embedding.weight"].shape
    channels = len(state["encoder.conv_in.weight"])
    levels = matching(state, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    config = TokenizerConfig(
        schedule=schedule,
        vocab_size=vocab_size,
        code_dim=code_dim,
        channels=channels,
        multipliers=tuple(len(weight) // channels for weight in levels),
        blocks=len(matching(state, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")),
        num_phi=len(matching(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")),
    )
    return load_strictly(Tokenizer(config), rename(state, TOKENIZER_NAMES), name)


def official_state(source: str | Path | Mapping[str, Tensor], part: str) -> tuple[StateDict, str]:
    """A flat state dict and a name for messages, from a file or a dictionary in memory.

    The published trainers save a dictionary that holds the parts under `trainer`; compiled or wrapped modules prefix
    their keys.
    """
    name = f"the {part} state dict"
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        source = read_weights(path) if path.suffix == ".safetensors" else read_torch(path)
    state: Any = source.get("trainer", source)
    inside = {"network": ("mvar_wo_ddp", "var_wo_ddp"), "tokenizer": ("vae_local",)}[part]
    state = next((state[key] for key in inside if key in state), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name} is not a state dict of a published {part}")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}, name


def matching(state: StateDict, pattern: str) -> list[Tensor]:
    """The tensors whose keys match, in the order of the number that the pattern captures."""
    found = {int(m[1]): state[key] for key in state if (m := re.fullmatch(pattern, key))}
    return [found[i] for i in sorted(found)]


def rename(state: StateDict, names: list[tuple[str, str]]) -> StateDict:
    """Our names for official keys, without the buffers that hold nothing learned."""
    renamed = {}
    for key, tensor in state.items():
        if key.rsplit(".", 1)[-1] in OFFICIAL_BUFFERS:
            continue
        for pattern, ours in names:
            key = re.sub(pattern, ours, key)
        renamed[key] = tensor
    return renamed
