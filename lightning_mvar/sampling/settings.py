"""Sampling settings, shared by the command line, callbacks, pipeline and web page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from torch import Tensor

from lightning_mvar.errors import InputError
from lightning_mvar.models.config import MVARConfig
from lightning_mvar.sampling.guidance import Guidance, check_per_scale
from lightning_mvar.sampling.philox import image_keys
from lightning_mvar.sampling.values import integer, number, per_scale

MAX_SEED = 2**63 - 1
PROTOCOL = ("guidance", "top_k", "top_p", "smooth", "seed")  # the settings of published scores
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 1000  # logits divided by it stay finite in float32


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of token sampling; the defaults are those of the papers' scores.

    Args:
        guidance: classifier-free guidance scale at the finest scale, growing from 0 at the coarsest; 0 for none. Or a
            list with one per scale; or `guidance.strength` with others of its options, see `Guidance`.
        top_k: sample from the k most likely tokens; 0, or more than the vocabulary has, for all.
        top_p: then from the fewest tokens whose probabilities sum to p; 0 or 1 for all.
        smooth: mix codes by a Gumbel-softmax instead of drawing one: smoother images to look at, never for scores.
        seed: random seed, from 0 to 2^63 - 1; image i of a seed has a random stream of its own.
        temperature: divides the logits before top-k and top-p: below 1 for likelier tokens, above 1 for more variety.
            A number, or a list with one per scale.

    Raises:
        InputError: if a value is out of range or of another type.
    """

    guidance: float | tuple[float, ...] | Guidance = 1.5
    top_k: int = 900
    top_p: float = 0.96
    smooth: bool = False
    seed: int = 0
    temperature: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        normalized = {
            "guidance": self.guidance if isinstance(self.guidance, Guidance) else self.guide.strength,
            "top_k": integer("top_k", self.top_k),
            "top_p": number("top_p", self.top_p, 1),
            "seed": integer("seed", self.seed, MAX_SEED),
            "temperature": per_scale("temperature", self.temperature, MAX_TEMPERATURE, MIN_TEMPERATURE),
        }
        if not isinstance(self.smooth, bool):
            raise InputError(f"smooth must be True or False, got {self.smooth!r}")
        for name, value in normalized.items():
            object.__setattr__(self, name, value)

    @property
    def guide(self) -> Guidance:
        """The guidance as an object, also if it was given as numbers."""
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(self.guidance)

    def temperature_of(self, scale: int) -> float:
        return self.temperature[scale] if isinstance(self.temperature, tuple) else self.temperature

    def check(self, network: MVARConfig) -> None:
        """Raises InputError unless these settings suit a network."""
        self.guide.check(network)
        check_per_scale("temperature", self.temperature, network)

    def metadata(self) -> dict[str, bool | int | float | str]:
        """Returns the settings by name, as a set of images records them: numbers per scale are joined by commas.

        The settings of the published protocol are always among them, others only if they are not the default.
        """
        own = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        own["guidance"] = self.guide.strength, None
        for field in fields(Guidance)[1:]:
            own[f"guidance_{field.name}"] = getattr(self.guide, field.name), field.default
        recorded = {name: value for name, (value, default) in own.items() if name in PROTOCOL or value != default}
        return {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in recorded.items()}

    def keys(self, numbers: Iterable[int]) -> Tensor:
        """Returns the key (b, 2) int64 of the random numbers of each image, given by its number."""
        return image_keys(self.seed, numbers)


def metadata_names() -> list[str]:
    """Returns all names that `SamplingSettings.metadata` may use."""
    own = [field.name for field in fields(SamplingSettings)]
    return own + [f"guidance_{field.name}" for field in fields(Guidance)[1:]]
