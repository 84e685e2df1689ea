import pytest
import torch
from conftest import Pixels

from lightning_mvar import Tokenizer
from lightning_mvar.metrics.frechet import Statistics, frechet_distance
from lightning_mvar.metrics.perturbation import CODES, SHARES, PerturbedScores, nearest_codes, perturb
from lightning_mvar.metrics.summary import prepare
from lightning_mvar.sampling.philox import image_keys


def test_the_nearest_codes_are_those_of_a_plain_loop() -> None:
    codebook = torch.randn(1100, 3, generator=torch.Generator().manual_seed(0))  # more rows than one block
    nearest = nearest_codes(codebook, 5)
    assert torch.equal(nearest[:, 0], torch.arange(1100))
    for code in (0, 500, 1099):
        distances = [float((codebook[code] - other).square().sum()) for other in codebook]
        assert nearest[code].tolist() == sorted(range(1100), key=distances.__getitem__)[:5]


def test_a_share_of_the_tokens_is_drawn_uniformly_from_the_nearest_codes() -> None:
    tokens = torch.randint(64, (40, 130), generator=torch.Generator().manual_seed(0))
    nearest = torch.stack([(torch.arange(64) + i) % 64 for i in range(4)], dim=1)
    keys = image_keys(0, range(40))
    assert torch.equal(perturb(tokens, nearest, 0.0, keys, 0), tokens)
    steps = (perturb(tokens, nearest, 0.8, keys, 0) - tokens) % 64
    shares = steps.flatten().bincount(minlength=4) / steps.numel()
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.2, 0.2, 0.2]), atol=0.02, rtol=0)
    assert not torch.equal(perturb(tokens, nearest, 0.8, keys, 1), perturb(tokens, nearest, 0.8, keys, 0))
    alone = torch.cat([perturb(tokens[i : i + 1], nearest, 0.8, keys[i : i + 1], 0) for i in range(40)])
    assert torch.equal((alone - tokens) % 64, steps)


def test_the_score_is_the_mean_distance_over_the_settings(tokenizer: Tokenizer) -> None:
    """Compares with a loop over settings on all images at once; the scores take them in batches."""
    config = tokenizer.config
    tokens = torch.randint(
        config.vocab_size, (20, config.schedule.num_tokens), generator=torch.Generator().manual_seed(0)
    )
    extractor = prepare(Pixels(), torch.device("cpu"))
    scores = PerturbedScores(tokenizer, extractor)
    for batch in tokens.split(7):
        scores.update(batch)
    originals = Statistics(torch.zeros(4).double(), torch.eye(4).double())
    distances, keys = [], image_keys(0, range(20))
    for setting in range(9):
        share, codes = SHARES[setting // 3], CODES[setting % 3]
        nearest = nearest_codes(tokenizer.quantizer.codebook.weight.detach(), max(2, round(codes * config.vocab_size)))
        with torch.no_grad():
            images = (tokenizer.decode(perturb(tokens, nearest, share, keys, setting)) + 1) / 2
        features = extractor(images).double()
        distances.append(frechet_distance(originals, Statistics(features.mean(0), features.T.cov())))
    assert scores.compute(originals) == pytest.approx(sum(distances) / 9, rel=1e-6)
