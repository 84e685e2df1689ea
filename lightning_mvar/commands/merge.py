"""`merge`: writes a linear combination of networks as one self-contained folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lightning_mvar.checkpoints import StoredModel, WhichWeights, open_trained
from lightning_mvar.checkpoints.merge import Term
from lightning_mvar.checkpoints.merge import merge as merge_networks
from lightning_mvar.checkpoints.power_ema import Profile, check_sigma_rel, reconstruct
from lightning_mvar.checkpoints.training import open_snapshots, resolve_last
from lightning_mvar.cli.arguments import refuse_overwriting
from lightning_mvar.cli.tables import print_rows
from lightning_mvar.errors import InputError
from lightning_mvar.io.locks import lock_folder


def merge(
    networks: tuple[str, ...],
    *,
    out: str,
    coefficients: tuple[float, ...] | None = None,
    base: str | None = None,
    away: float | None = None,
    ema: float | None = None,
    tokenizer: str | None = None,
    weights: WhichWeights = "ema",
) -> None:
    """Writes a linear combination of networks as one self-contained folder, for `sample`, `evaluate` and `fit`.

    Examples: `merge A B --out DIR` averages, `merge S --base T --away 1.0 --out DIR` moves T away from S. Tensors are
    merged one at a time to save memory. Running the same command again replaces its own result; nothing else is
    replaced.

    Args:
        networks: one or more checkpoints of `fit` (sharded or not), folders of `export`, or published files (.pth,
            .safetensors), of the same architecture, classes and tokenizer. They should descend from the same weights.
        out: folder for the safetensors and config.json, which names networks and coefficients.
        coefficients: one factor per network, which may be negative: `A B --coefficients 0.7 0.3` writes 0.7 A + 0.3 B.
            Default: the average.
        base: network that the others are compared with: `A B --base T --coefficients 0.5 0.4` writes
            T + 0.5 (A - T) + 0.4 (B - T), called task arithmetic.
        away: `S --base T --away W` writes T + W (T - S): Neon (arXiv 2510.03597), if S is T fine-tuned on samples of T.
        ema: `SNAPSHOT ... --ema SIGMA_REL` writes the power-function average of this relative width at the step of the
            newest snapshot (EDM2, arXiv 2312.02696). Snapshots are checkpoints of one run with `model.power_ema`; use
            configs/callbacks/snapshots.yaml to keep them.
        tokenizer: folder of the tokenizer, if it is no longer at the path recorded in the checkpoints; for published
            networks also a published file.
        weights: for a checkpoint, `ema` for the averaged weights if it has them, `raw` for the last ones.
    """
    paths = [*networks, *([] if base is None else [base])]
    inputs = {f"network {number}": path for number, path in enumerate(paths, start=1)}
    refuse_overwriting({"--out": out}, {**inputs, "--tokenizer": tokenizer})
    if ema is not None:
        if (coefficients, base, away) != (None, None, None):
            raise InputError("--ema computes the coefficients itself: drop --coefficients, --base and --away")
        if weights != "ema":
            raise InputError(f"--ema reads the power-function averages of snapshots: drop --weights {weights}")
        check_sigma_rel(ema, "--ema")
        terms = power_average(networks, ema, tokenizer)
    else:
        factors = resolve_coefficients(len(networks), coefficients, base is not None, away)
        terms = [
            Term(factor, open_trained(path, tokenizer, weights)) for factor, path in zip(factors, paths, strict=True)
        ]
    with lock_folder(Path(out), "merge"):
        merge_networks(terms, Path(out))
    print_rows([[f"{factor:+.6g}", model.source, model.part] for factor, model in terms])
    print(f"merged network and tokenizer in {out}")


def power_average(paths: tuple[str, ...], sigma_rel: float, tokenizer: str | None) -> list[Term]:
    """Finds the coefficients that combine the averages in snapshots into an average of another width; see `merge`.

    Raises:
        InputError: if a path is not a snapshot, or two snapshots have the same step or come from different runs.
    """
    steps: dict[int, str] = {}
    snapshots: list[tuple[Profile, StoredModel]] = []
    first: dict[str, object] = {}
    for path in paths:
        opened = open_snapshots(resolve_last(Path(path)), tokenizer)
        step = opened[0][0].step
        if step in steps:
            raise InputError(f"{steps[step]} and {path} have the same step {step}: name each snapshot of a run once")
        settings = {"power_ema": [profile.sigma_rel for profile, _ in opened], **asdict(opened[0][1].config)}
        first = first or settings
        for name in settings:
            if settings[name] != first[name]:
                raise InputError(
                    f"{path} and {paths[0]} are snapshots of different runs: the {name} of {path} is "
                    f"{settings[name]}, not {first[name]}"
                )
        steps[step] = path
        snapshots += opened
    profiles = [profile for profile, _ in snapshots]
    coefficients, error = reconstruct(profiles, Profile(max(steps), sigma_rel))
    print(f"sigma_rel {sigma_rel:g} at step {max(steps)} from {len(paths)} snapshots, relative error {error:.2%}")
    return [Term(coefficient, model) for coefficient, (_, model) in zip(coefficients, snapshots, strict=True)]


def resolve_coefficients(
    count: int, coefficients: tuple[float, ...] | None, has_base: bool, away: float | None
) -> list[float]:
    """Returns the factor of each network, followed by that of the base if there is one; see `merge`.

    Raises:
        InputError: if the options contradict each other, or the number of coefficients is not that of networks.
    """
    if away is not None:
        if coefficients is not None or not has_base or count != 1:
            raise InputError(
                "--away goes with --base and one network, without --coefficients: merge S --base T --away W"
            )
        coefficients = (-away,)
    elif has_base and coefficients is None:
        raise InputError("--base needs --coefficients, one per network, or --away")
    elif coefficients is None:
        coefficients = (1 / count,) * count
    if len(coefficients) != count:
        raise InputError(f"--coefficients has {len(coefficients)} numbers for {count} networks; give one per network")
    return [*coefficients, *([1 - sum(coefficients)] if has_base else [])]
