"""Sampling settings, shared by the command line, callbacks, pipeline and web page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.sampling.drafts import Drafts
from lightning_mvar.sampling.guidance import Guidance, check_per_scale
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.values import integer, number, per_scale

MAX_SEED = 2**63 - 1
PROTOCOL = ("guidance", "top_k", "top_p", "smooth", "seed")  # the settings of published scores
MAX_GUIDANCE = 1000  # logits stay finite in float32
MAX_DRAFTS = 4096
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000  # logits divided by it stay finite in float32


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of token sampling; the defaults are the settings of the papers' scores.

    Args:
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none. Or a
            list with one number per scale, such as [0,0.5,1].
        top_k: sample from the k most likely tokens; 0, or more than the vocabulary has, for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 0 or 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images for viewing, never for scores.
        seed: random seed, from 0 to 2^63 - 1; each image number has its own random stream.
        temperature: divides the logits before top-k and top-p: below 1 for likelier tokens, above 1 for more variety.
            A number, or a list with one number per scale.
        guidance_off_from: index of the first scale that is drawn without guidance; the guide costs nothing from there
            on.
        guidance_network: guide by a weaker network instead of the unconditional class (autoguidance): a checkpoint of
            `fit`, a folder of `export` or a published file, with the same tokenizer, classes and scales.
        guidance_corrupt: guide by the same network after a prefix in which this share of the tokens is replaced by
            random ones (VPG), instead of the unconditional class.
        guidance_beta: adds beta (l_k - l_(k-1)) to the logits l_k of each scale (SSG); works without guidance.
        drafts: number of candidates per scale among which a scorer chooses (LSRS); 1 for no choice.
        draft_scorer: folder of a scorer that `train-scorer` trained on samples of the same network.
        draft_scales: indices of the scales that have several candidates, counted from 0, such as 1 2 3; all if not
            given.

    Raises:
        InputError: if a value is out of range or of another type.
    """

    guidance: float | tuple[float, ...] = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False
    seed: int = 0
    temperature: float | tuple[float, ...] = 1.0
    guidance_off_from: int | None = None
    guidance_network: str | None = None
    guidance_corrupt: float = 0.0
    guidance_beta: float = 0.0
    drafts: int = 1
    draft_scorer: str | None = None
    draft_scales: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        normalized = {
            "guidance": per_scale("guidance", self.guidance, MAX_GUIDANCE),
            "top_k": integer("top_k", self.top_k),
            "top_p": number("top_p", self.top_p, 1),
            "seed": integer("seed", self.seed, MAX_SEED),
            "temperature": per_scale("temperature", self.temperature, MAX_TEMPERATURE, MIN_TEMPERATURE),
            "guidance_corrupt": number("guidance_corrupt", self.guidance_corrupt, 1),
            "guidance_beta": number("guidance_beta", self.guidance_beta, MAX_GUIDANCE),
            "drafts": integer("drafts", self.drafts, MAX_DRAFTS, 1),
        }
        if self.guidance_off_from is not None:
            normalized["guidance_off_from"] = integer("guidance_off_from", self.guidance_off_from)
        if self.draft_scales is not None:
            if not isinstance(self.draft_scales, Sequence) or isinstance(self.draft_scales, str):
                raise InputError(f"draft_scales must be a list of scales, got {self.draft_scales!r}")
            normalized["draft_scales"] = tuple(integer("each of draft_scales", k) for k in self.draft_scales)
        if self.guidance_network is not None and self.guidance_corrupt:
            raise InputError("there is one guide: give guidance_network or guidance_corrupt, not both")
        if self.drafts > 1 and self.draft_scorer is None:
            raise InputError(f"drafts {self.drafts} needs a draft_scorer, which `lightning-mvar train-scorer` writes")
        if not isinstance(self.smooth, bool):
            raise InputError(f"smooth must be True or False, got {self.smooth!r:.80}")
        if self.smooth and self.drafts > 1:
            raise InputError("smooth mixes codes, so there are no drafts to choose among: drop smooth or drafts")
        for name, value in normalized.items():
            object.__setattr__(self, name, value)

    @cached_property
    def guide(self) -> Guidance:
        return Guidance(
            self.guidance, self.guidance_off_from, self.guidance_network, self.guidance_corrupt, self.guidance_beta
        )

    @cached_property
    def choice(self) -> Drafts:
        return Drafts(self.drafts, self.draft_scorer, self.draft_scales)

    def temperature_of(self, scale: int) -> float:
        return self.temperature[scale] if isinstance(self.temperature, tuple) else self.temperature

    def check(self, network: MVARConfig) -> None:
        """Raises InputError unless these settings fit a network."""
        self.guide.check(network)
        check_per_scale("temperature", self.temperature, network)
        self.choice.check(network)

    def metadata(self) -> dict[str, bool | int | float | str]:
        """Returns the settings by name, as a set of images records them; numbers per scale are joined by commas.

        The settings of the published protocol are always included, others only if they differ from the default and have
        an effect: draft settings only if there are several drafts. A guiding network is never included: its path may
        hold another one later.
        """
        left_out = {"guidance_network"} | ({"draft_scorer", "draft_scales"} if self.drafts == 1 else set())
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        defaults = {field.name: field.default for field in fields(self) if field.name not in PROTOCOL}
        recorded = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
        return {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in recorded.items()}

    def keys(self, numbers: Iterable[int]) -> Tensor:
        """Returns the keys (b, 2) int64 of the random streams of images with these numbers."""
        return image_keys(self.seed, numbers)
