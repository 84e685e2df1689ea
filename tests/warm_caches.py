"""Imported by the tests' fork server: computes the costs of the network of `run_folder` once for all runs.

Every run writes its costs to its log. They take longer than its training steps, because the shapes of the meta device
need further imports and are computed in Python.
"""

import yaml
from conftest import RUN_YAML

from lightning_mvar import MVARConfig, ScaleSchedule
from lightning_mvar.models.costs import costs_of

options = yaml.safe_load(RUN_YAML.format(tokenizer=""))["model"]["network"]
costs_of(MVARConfig(**options | {"schedule": ScaleSchedule(tuple(options["schedule"]["side_lengths"]))}))
