"""Conversion of published VAR, M-VAR and tokenizer weights to our format and back.

The configuration is inferred from keys and shapes. Both directions use the same table of names per part, and error
messages use the published names.

| published key                    | meaning                                                                       |
|----------------------------------|-------------------------------------------------------------------------------|
| lvl_1L                           | scale of each token: gives the schedule; some files lack it                   |
| attn.scale_mul_1H11              | temperature per head; absent without QK-norm                                  |
| ada_gss, shared_ada_lin          | AdaLN table per block and the shared projection; absent without shared AdaLN  |
| mamba.*                          | absent in VAR                                                                 |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.io.tensors import StateDict, check_state_dict, load_strictly
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.models.mvar import MVAR
from lightning_mvar.scales import ScaleSchedule
from lightning_mvar.tokenizer.tokenizer import Tokenizer, TokenizerConfig

Names = list[tuple[str, str]]

VAR, M_VAR = ("block_causal_attention",), ("scale_attention", "mamba2")  # the mixers of the published networks
BUFFERS = ("zero_k_bias", "patch_nums", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")  # not learned
HEAD_DIM = 64  # in every published network; without QK-norm, the weights do not reveal the number of heads

# Raised while inferring a configuration if tensors are missing or have unexpected dimensions.
SHAPE_ERRORS = (InputError, LookupError, ValueError, TypeError, RuntimeError, ZeroDivisionError)

# (published, ours): key prefixes; * matches a number; the first match applies.
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
    """Replaces the prefix of a key according to the first (old, new) pair that matches, if any."""
    for old, new in names:
        if match := re.match(re.escape(old).replace(r"\*", r"(\d+)"), key):
            for number in match.groups():
                new = new.replace("*", number, 1)
            return new + key[match.end() :]
    return key


def invert(names: Names) -> Names:
    return [(ours, published) for published, ours in names]


def describe_error(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def without_buffers(state: Mapping[str, Tensor]) -> StateDict:
    """Drops the buffers, which are not learned."""
    return {key: tensor for key, tensor in state.items() if key.rsplit(".", 1)[-1] not in BUFFERS}


def network_from_published(
    state: Mapping[str, Tensor], source: object, schedule: ScaleSchedule | None = None
) -> tuple[MVARConfig, StateDict]:
    """Converts a published state dict to the architecture and weights of a network.

    Args:
        state: the state dict.
        source: its name in messages.
        schedule: scale schedule of weights without `lvl_1L`.

    Raises:
        InputError: if keys and shapes are not those of a published network, or the schedule is unknown or differs.
    """
    if not {"pos_1LC", "word_embed.weight", "head.weight"} <= state.keys():
        hint = "; it looks like a tokenizer" if "quantize.embedding.weight" in state else ""
        raise InputError(f"{source} does not have the keys of a published VAR or M-VAR network{hint}")
    if "lvl_1L" not in state:
        if schedule is None:
            raise InputError(
                f"{source} does not say its scale schedule (it has no lvl_1L): give it with `lightning-mvar export "
                f"--official FILE --resolution 256`, or --side_lengths, or as `schedule` in Python"
            )
        state = {**state, "lvl_1L": schedule.scale_ids[None]}
    try:
        config = network_config(state)
        if schedule is not None and config.schedule != schedule:
            raise InputError(f"its side lengths are {config.schedule.side_lengths}, not {schedule.side_lengths}")
    except SHAPE_ERRORS as error:
        raise InputError(f"{source} is not a complete VAR or M-VAR network ({describe_error(error)})") from error
    with torch.device("meta"):
        network = MVAR(config)
    check_state_dict(
        network_weights(network), without_buffers(state), f"{source} is not a complete VAR or M-VAR network"
    )
    weights = {rename(key, NETWORK_NAMES): tensor for key, tensor in without_buffers(state).items()}
    for key in weights:
        if key.endswith("qk_scale_log"):
            weights[key] = weights[key].flatten()
    return config, weights


def network_config(state: Mapping[str, Tensor]) -> MVARConfig:
    """Infers the configuration from the keys and shapes of a published state dict."""
    width, code_dim = state["word_embed.weight"].shape
    if state["lvl_1L"].is_complex():
        raise InputError("lvl_1L holds complex numbers")
    scales = state["lvl_1L"].flatten().long()
    if scales.min() < 0 or scales.max() >= len(state["lvl_embed.weight"]):
        raise InputError(
            f"lvl_1L numbers the scales from {scales.min()} to {scales.max()}, but there are "
            f"{len(state['lvl_embed.weight'])} scale embeddings"
        )
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
    """Returns 1 + the largest number in place of * in keys that start with `pattern`; 0 if no key does."""
    match = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)")).match
    return 1 + max((int(hit[1]) for hit in map(match, keys) if hit), default=-1)


def network_weights(network: MVAR) -> StateDict:
    """Returns the published state dict of a network without buffers; weights are shared, not copied."""
    names = invert(NETWORK_NAMES)
    state = {rename(key, names): tensor for key, tensor in network.state_dict().items()}
    return {key: t.view(1, -1, 1, 1) if key.endswith("scale_mul_1H11") else t for key, t in state.items()}


def network_to_published(network: MVAR) -> StateDict:
    """Returns the published state dict of a network, buffers included; weights are shared, not copied.

    Raises:
        InputError: if the published code does not support such a network.
    """
    config, schedule = network.config, network.config.schedule
    refuse_unsupported(unsupported_network(config))
    state, scale = network_weights(network), schedule.scale_ids
    # VAR masks finer scales; M-VAR, whose attention stays inside each scale, masks all other scales.
    masked = scale[:, None] != scale if config.mixers == M_VAR else scale[:, None] < scale  # (l, l), query and key
    state["lvl_1L"] = scale[None].clone()
    state["attn_bias_for_masking"] = torch.zeros(1, 1, *masked.shape).masked_fill(masked, -torch.inf)
    for i in range(config.depth):
        state[f"blocks.{i}.attn.zero_k_bias"] = torch.zeros(config.width)
        if config.mixers == M_VAR:  # despite its name, the number of tokens per scale
            state[f"blocks.{i}.attn.patch_nums"] = torch.tensor(schedule.lengths, dtype=torch.int32)
    return state


def tokenizer_from_published(state: Mapping[str, Tensor], schedule: ScaleSchedule, source: object) -> Tokenizer:
    """Builds a tokenizer in eval mode from a published state dict, which lacks the schedule.

    Raises:
        InputError: if keys and shapes are not those of a published tokenizer.
    """
    if not {"quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight"} <= state.keys():
        hint = "; it looks like a network" if "word_embed.weight" in state else ""
        raise InputError(f"{source} does not have the keys of a published tokenizer{hint}")
    try:
        config = tokenizer_config(state, schedule)
    except SHAPE_ERRORS as error:
        raise InputError(f"{source} is not a complete tokenizer ({describe_error(error)})") from error
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    check_state_dict(tokenizer_weights(tokenizer), without_buffers(state), f"{source} is not a complete tokenizer")
    return load_strictly(tokenizer, {rename(k, TOKENIZER_NAMES): t for k, t in without_buffers(state).items()}, source)


def tokenizer_config(state: Mapping[str, Tensor], schedule: ScaleSchedule) -> TokenizerConfig:
    """Infers the configuration, except the schedule, from the keys and shapes of a published state dict."""
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
    """Returns the published state dict of a tokenizer without buffers; weights are shared, not copied."""
    names = invert(TOKENIZER_NAMES)
    return {rename(key, names): tensor for key, tensor in tokenizer.state_dict().items()}


def tokenizer_to_published(tokenizer: Tokenizer) -> StateDict:
    """Returns the published state dict of a tokenizer, buffers included; weights are shared, not copied.

    Raises:
        InputError: if the published code does not support such a tokenizer.
    """
    config = tokenizer.config
    refuse_unsupported(unsupported_tokenizer(config))
    # Our tokenizer does not store this training statistic.
    usage = torch.zeros(config.schedule.num_scales, config.vocab_size)
    return tokenizer_weights(tokenizer) | {"quantize.ema_vocab_hit_SV": usage}


def unsupported_network(config: MVARConfig) -> list[str]:
    """Returns the reasons why the published code does not support a network, one per field; empty if it does."""
    reasons = []
    if config.mixers not in (VAR, M_VAR):
        allowed = f"{', '.join(M_VAR)} (M-VAR) or {', '.join(VAR)} (VAR)"
        reasons.append(f"mixers are {config.mixer_summary}, must be {allowed}")
    fixed: tuple[str, ...] = ("prediction",)
    if config.mixers == M_VAR:
        fixed += ("parallel", "scan_order", "state_dim", "conv_width", "expand", "head_dim", "shared_adaln")
    reasons += other_fields(config, fixed)
    if not config.qk_norm and config.width != HEAD_DIM * config.heads:
        reasons.append(f"heads have dim {config.width // config.heads}, must have {HEAD_DIM} without qk_norm")
    return reasons


def unsupported_tokenizer(config: TokenizerConfig) -> list[str]:
    """Returns the reasons why the published code does not support a tokenizer; see `unsupported_network`."""
    reasons = other_fields(config, ("multipliers", "blocks", "num_phi", "norm_groups"))
    if config.channels % config.norm_groups:
        reasons.append(f"channels are {config.channels}, must be a multiple of {config.norm_groups}")
    return reasons


def other_fields(config: MVARConfig | TokenizerConfig, fixed: tuple[str, ...]) -> list[str]:
    """Describes the `fixed` fields that differ from the published values, which are the defaults."""
    pairs = [(name, getattr(config, name), getattr(type(config)(), name)) for name in fixed]
    return [f"{name} is {ours}, must be {theirs}" for name, ours, theirs in pairs if ours != theirs]


def refuse_unsupported(reasons: list[str]) -> None:
    if reasons:
        raise InputError(f"the published code cannot hold these weights: {'; '.join(reasons)}")
