"""The published VAR, M-VAR and tokenizer weights: their keys and shapes, to ours and back.

A configuration is read off keys and shapes alone. Both directions follow one table of names
for each part, and whatever does not fit is told in the published names.

| published key                    | what it is                                                                    |
|----------------------------------|-------------------------------------------------------------------------------|
| lvl_1L                           | scale of each token: gives the schedule                                       |
| attn.scale_mul_1H11              | temperature per head; absent without QK-norm                                  |
| ada_gss, shared_ada_lin          | AdaLN table of a block and its shared projection; absent with a Linear each   |
| mamba.*                          | absent in VAR                                                                 |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_mvar.checkpoints.folders import load_tokenizer, require_folder
from lightning_mvar.checkpoints.pair import TrainedModel, check_pair
from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import StateDict, check_same, load_strictly, read_torch, read_weights, save_torch
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

Names = list[tuple[str, str]]

VAR, M_VAR = ("block_causal_attention",), ("scale_attention", "mamba2")  # the mixers of the published networks
BUFFERS = ("zero_k_bias", "patch_nums", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")  # nothing learned
HEAD_DIM = 64  # of every published network; those without QK-norm do not tell their number of heads

# What reading a configuration raises where tensors are missing or have other dimensions.
NOT_THESE_SHAPES = (InputError, LookupError, ValueError, TypeError, RuntimeError, ZeroDivisionError)

# (published, ours): beginnings of keys, * stands for a number, the first that fits counts.
NETWORK_NAMES: Names = [
    ("pos_start", "start_embed"),
    ("pos_1LC", "pos_embed"),
    ("lvl_embed.", "scale_embed."),
    ("class_emb.", "class_embed."),
    ("word_embed.", "input_proj."),
    ("shared_ada_lin.1.", "shared_adaln."),
    ("head_nm.ada_lin.1.", "head_adaln."),
    ("blocks.*.ada_gss", "blocks.*.adaln_table"),
    ("blocks.*.ada_lin.1.", "blocks.*.adaln."),
    ("blocks.*.attn.scale_mul_1H11", "blocks.*.mixers.0.qk_scale_log"),
    ("blocks.*.attn.mat_qkv.", "blocks.*.mixers.0.qkv."),
    ("blocks.*.attn.", "blocks.*.mixers.0."),
    ("blocks.*.mamba.", "blocks.*.mixers.1."),
    ("blocks.*.ffn.fc1.", "blocks.*.mlp.0."),
    ("blocks.*.ffn.fc2.", "blocks.*.mlp.2."),
]

TOKENIZER_NAMES: Names = [
    ("quantize.embedding.", "quantizer.codebook."),
    ("quantize.quant_resi.qresi_ls.", "quantizer.phi."),
    ("encoder.down.*.downsample.conv.", "encoder.levels.*.resample."),
    ("decoder.up.*.upsample.conv.", "decoder.levels.*.resample."),
    *(
        pair
        for part, level in (("encoder", "encoder.down"), ("decoder", "decoder.up"))
        for pair in (
            (f"{level}.*.block.*.nin_shortcut.", f"{part}.levels.*.blocks.*.skip."),
            (f"{level}.*.block.", f"{part}.levels.*.blocks."),
            (f"{level}.*.attn.*.proj_out.", f"{part}.levels.*.attentions.*.proj."),
            (f"{level}.*.attn.", f"{part}.levels.*.attentions."),
            (f"{part}.mid.block_1.", f"{part}.middle.0."),
            (f"{part}.mid.attn_1.proj_out.", f"{part}.middle.1.proj."),
            (f"{part}.mid.attn_1.", f"{part}.middle.1."),
            (f"{part}.mid.block_2.", f"{part}.middle.2."),
        )
    ),
]


def rename(key: str, names: Names) -> str:
    """The key by the first pair of (beginning, new beginning) that fits; itself where none does."""
    for old, new in names:
        if match := re.match(re.escape(old).replace(r"\*", r"(\d+)"), key):
            for number in match.groups():
                new = new.replace("*", number, 1)
            return new + key[match.end() :]
    return key


def reverse(names: Names) -> Names:
    return [(ours, published) for published, ours in names]


def reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def learned(state: Mapping[str, Tensor]) -> StateDict:
    """`state` without the buffers that hold nothing learned."""
    return {key: tensor for key, tensor in state.items() if key.rsplit(".", 1)[-1] not in BUFFERS}


def read_network(state: Mapping[str, Tensor], source: object) -> MVAR:
    """A network in eval mode from a published state dict; `source` names it in messages.

    Raises:
        InputError: if keys and shapes are not those of a published network.
    """
    if not {"lvl_1L", "pos_1LC", "word_embed.weight", "head.weight"} <= state.keys():
        hint = "; it looks like a tokenizer" if "quantize.embedding.weight" in state else ""
        raise InputError(f"{source} has not the keys of a published VAR or M-VAR network{hint}")
    try:
        config = network_config(state)
    except NOT_THESE_SHAPES as error:
        raise InputError(f"{source} is not a whole VAR or M-VAR network ({reason(error)})") from error
    with torch.device("meta"):
        network = MVAR(config)
    check_same(network_weights(network), learned(state), f"{source} is not a whole VAR or M-VAR network")
    weights = {rename(key, NETWORK_NAMES): tensor for key, tensor in learned(state).items()}
    for key in weights:
        if key.endswith("qk_scale_log"):
            weights[key] = weights[key].flatten()
    return load_strictly(network, weights, source)


def network_config(state: Mapping[str, Tensor]) -> MVARConfig:
    """Every field of the configuration from the keys and shapes of a published state dict."""
    width, code_dim = state["word_embed.weight"].shape
    scales = state["lvl_1L"].flatten().long()
    if scales.min() < 0 or scales.max() >= len(state["lvl_embed.weight"]):
        raise InputError(f"lvl_1L numbers the scales from {scales.min()} to {scales.max()}")
    counts = torch.bincount(scales)
    scale_mul, A_log = (state.get(f"blocks.0.{key}") for key in ("attn.scale_mul_1H11", "mamba.A_log"))
    mamba: dict[str, Any] = {}
    if A_log is not None:
        inner, heads = len(state["blocks.0.mamba.norm.weight"]), len(A_log)
        mamba["state_dim"] = (len(state["blocks.0.mamba.in_proj.weight"]) - 2 * inner - heads) // 2
        mamba["conv_width"] = state["blocks.0.mamba.conv1d.weight"].shape[-1]
        mamba["expand"], mamba["head_dim"] = inner // width, inner // heads
    return MVARConfig(
        schedule=ScaleSchedule(tuple(round(n**0.5) for n in counts.tolist())),
        depth=count(state, "blocks.*."),
        width=width,
        heads=width // HEAD_DIM if scale_mul is None else scale_mul.numel(),
        vocab_size=len(state["head.weight"]),
        code_dim=code_dim,
        num_classes=len(state["class_emb.weight"]) - 1,
        mixers=VAR if A_log is None else M_VAR,
        qk_norm=scale_mul is not None,
        shared_adaln="shared_ada_lin.1.weight" in state,
        **mamba,
    )


def count(keys: Iterable[str], pattern: str) -> int:
    """How many numbers occur for the * in keys that begin with `pattern`, counted from 0 to the largest."""
    match = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)")).match
    return 1 + max((int(found[1]) for found in map(match, keys) if found), default=-1)


def network_weights(network: MVAR) -> StateDict:
    """The learned part of the published state dict of a network; weights are shared, not copied."""
    names = reverse(NETWORK_NAMES)
    state = {rename(key, names): tensor for key, tensor in network.state_dict().items()}
    return {key: t.view(1, -1, 1, 1) if key.endswith("scale_mul_1H11") else t for key, t in state.items()}


def write_network(network: MVAR) -> StateDict:
    """The published state dict of a network, buffers included; weights are shared, not copied.

    Raises:
        InputError: if the published code has no such network.
    """
    config, schedule = network.config, network.config.schedule
    if config.mixers not in (VAR, M_VAR):
        raise InputError(f"the published code has no network with mixers {config.mixing}")
    check_published(config, ("prediction",))
    if config.mixers == M_VAR:
        check_published(config, ("parallel", "scan_order", "state_dim", "conv_width", "expand", "head_dim"))
    if not config.qk_norm and config.width != HEAD_DIM * config.heads:
        raise InputError(f"without QK-norm the published format means heads of {HEAD_DIM}, got {config.heads} heads")
    if config.mixers == M_VAR and config.shared_adaln:
        raise InputError("the published M-VAR cannot share AdaLN")
    state, scale = network_weights(network), schedule.scale_ids
    # VAR masks what is finer; M-VAR, whose attention stays inside each scale, everything else.
    hidden = scale[:, None] != scale if config.mixers == M_VAR else scale[:, None] < scale  # (l, l), query and key
    state["lvl_1L"] = scale[None].clone()
    state["attn_bias_for_masking"] = torch.zeros(1, 1, *hidden.shape).masked_fill(hidden, -torch.inf)
    for i in range(config.depth):
        state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(config.width)
        if config.mixers == M_VAR:  # by this name, the number of tokens of each scale
            state[f"blocks.{i}.attn.patch_nums"] = torch.tensor(schedule.lengths, dtype=torch.int32)
    return state


def read_tokenizer(state: Mapping[str, Tensor], schedule: ScaleSchedule, source: object) -> Tokenizer:
    """A tokenizer in eval mode from a published state dict; the schedule is not in the weights.

    Raises:
        InputError: if keys and shapes are not those of a published tokenizer.
    """
    if not {"quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"} <= state.keys():
        hint = "; it looks like a network" if "word_embed.weight" in state else ""
        raise InputError(f"{source} has not the keys of a published tokenizer{hint}")
    try:
        config = tokenizer_config(state, schedule)
    except NOT_THESE_SHAPES as error:
        raise InputError(f"{source} is not a whole tokenizer ({reason(error)})") from error
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    check_same(tokenizer_weights(tokenizer), learned(state), f"{source} is not a whole tokenizer")
    return load_strictly(tokenizer, {rename(k, TOKENIZER_NAMES): t for k, t in learned(state).items()}, source)


def tokenizer_config(state: Mapping[str, Tensor], schedule: ScaleSchedule) -> TokenizerConfig:
    """Every field but the schedule from the keys and shapes of a published state dict."""
    vocab_size, code_dim = state["quantize.embedding.weight"].shape
    channels = len(state["encoder.conv_in.weight"])
    levels = range(count(state, "encoder.down.*."))
    return TokenizerConfig(
        schedule=schedule,
        vocab_size=vocab_size,
        code_dim=code_dim,
        channels=channels,
        multipliers=tuple(len(state[f"encoder.down.{i}.block.0.conv1.weight"]) // channels for i in levels),
        blocks=count(state, "encoder.down.0.block.*."),
        num_phi=count(state, "quantize.quant_resi.qresi_ls.*."),
    )


def tokenizer_weights(tokenizer: Tokenizer) -> StateDict:
    """The learned part of the published state dict of a tokenizer."""
    names = reverse(TOKENIZER_NAMES)
    return {rename(key, names): tensor for key, tensor in tokenizer.state_dict().items()}


def write_tokenizer(tokenizer: Tokenizer) -> StateDict:
    """The published state dict of a tokenizer, buffers included; weights are shared, not copied.

    Raises:
        InputError: if the published code has no such tokenizer.
    """
    config = tokenizer.config
    check_published(config, ("multipliers", "blocks", "num_phi", "norm_groups"))
    if config.channels % config.norm_groups:
        raise InputError(
            f"the published code takes channels in multiples of {config.norm_groups}, got {config.channels}"
        )
    usage = torch.zeros(config.schedule.num_scales, config.vocab_size)  # a statistic of its training, not kept by ours
    return tokenizer_weights(tokenizer) | {"quantize.ema_vocab_hit_SV": usage}


def check_published(config: MVARConfig | TokenizerConfig, fixed: tuple[str, ...]) -> None:
    """Raise InputError where a field that the published code fixes is another; the defaults are the published ones."""
    published = type(config)()
    for name in fixed:
        if (ours := getattr(config, name)) != (theirs := getattr(published, name)):
            raise InputError(f"the published code cannot hold these weights: {name} is {ours}, there always {theirs}")


def save_official(folder: str | Path, model: TrainedModel) -> list[Path]:
    """Write network and tokenizer as the published code reads them; the two files, named as it names them.

    Raises:
        InputError: if the published code has no such network or tokenizer.
    """
    network, tokenizer = model.network.config, model.tokenizer.config
    kind = "mvar" if network.mixers == M_VAR else "var"
    files = {
        f"{kind}_d{network.depth}.pth": write_network(model.network),
        f"vae_ch{tokenizer.channels}v{tokenizer.vocab_size}z{tokenizer.code_dim}.pth": write_tokenizer(model.tokenizer),
    }
    require_folder(Path(folder))
    for name, state in files.items():
        save_torch(state, Path(folder) / name)
    return [Path(folder) / name for name in files]


def load_official_mvar(source: str | Path | Mapping[str, Tensor]) -> MVAR:
    """A published VAR or M-VAR network, in eval mode; its configuration is read off keys and shapes.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of a published network.
    """
    return read_network(*official_state(source, "network"))


def load_official_tokenizer(source: str | Path | Mapping[str, Tensor], schedule: ScaleSchedule) -> Tokenizer:
    """The published tokenizer, in eval mode; its configuration is read off shapes, except the schedule.

    Args:
        source: a .pth or .safetensors file, or a state dict with the published keys.
        schedule: the scales to use it with; the weights do not tell.

    Raises:
        InputError: if the file cannot be read, or its keys or shapes are not those of the published tokenizer.
    """
    state, name = official_state(source, "tokenizer")
    return read_tokenizer(state, schedule, name)


def load_official(network: str | Path, tokenizer: str | Path | None = None) -> TrainedModel:
    """A published network with its tokenizer, whose classes have no names.

    Args:
        network: a .pth or .safetensors file, perhaps a training checkpoint that holds the tokenizer too.
        tokenizer: a published file, or a folder of ours; the one in `network` where not given.

    Raises:
        InputError: if a file cannot be read or is something else, or the two do not belong together.
    """
    model = load_official_mvar(network)
    if tokenizer is None:
        try:
            loaded = load_official_tokenizer(network, model.config.schedule)
        except InputError as error:
            raise InputError(f"{error}; name the tokenizer's own file with --tokenizer") from error
    elif Path(tokenizer).is_dir():
        loaded = load_tokenizer(tokenizer)
    else:
        loaded = load_official_tokenizer(tokenizer, model.config.schedule)
    check_pair(model.config, loaded.config, f"the tokenizer in {tokenizer or network}")
    return TrainedModel(model, loaded, [])


def official_state(source: str | Path | Mapping[str, Tensor], part: str) -> tuple[StateDict, str]:
    """A flat state dict and a name for messages, from a file or a dictionary in memory.

    The published trainers save a dictionary that holds the parts under `trainer`; compiled or wrapped modules prefix
    their keys.
    """
    name, state = f"the {part} state dict", cast(Any, source)
    if isinstance(source, str | Path):
        name, path = str(source), Path(source)
        state = read_weights(path) if path.suffix == ".safetensors" else read_torch(path)
    if isinstance(state.get("trainer"), Mapping):
        state = state["trainer"]
    inside = {"network": ("mvar_wo_ddp", "var_wo_ddp"), "tokenizer": ("vae_local",)}[part]
    state = next((state[key] for key in inside if key in state), state)
    if not isinstance(state, Mapping) or not all(
        isinstance(t, Tensor) and isinstance(k, str) for k, t in state.items()
    ):
        raise InputError(f"{name} is not a state dict of a published {part}")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in state.items()}, name
