"""Prints the CPU seconds of all scores and of their intervals on one core, and the peak memory in KiB.

Usage: python docs/scores_timing.py SAMPLES REAL_IMAGES FEATURES
"""

import resource
import sys
import time

import torch

from lightning_mvar.metrics.frechet import statistics_of
from lightning_mvar.metrics.scores import Scores
from lightning_mvar.metrics.summary import Summary

torch.set_num_threads(1)
samples, real, width = map(int, sys.argv[1:])
extractor, features = torch.nn.Flatten(), torch.randn(real, width)
extractor.num_features = width
scores = Scores(extractor, Summary(statistics_of(features), features=features), samples, keep_features=True)
for indices in torch.arange(samples).split(1000):
    scores.update(torch.randn(len(indices), width, 1, 1), indices)
begin = time.process_time()
values = scores.compute()
print("scores", time.process_time() - begin)
print(scores.intervals(values, 0.95), time.process_time() - begin)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
