"""Imported last by the tests' fork server: does once what every run would do before its first step.

It reads the options of all commands from their source, parses the configuration of `run_folder`, which compiles the
regular expressions of the docstrings' parser, and computes the costs of its network, which every run writes to its log:
they take longer than its training steps, because the shapes of the meta device need further imports and are computed
in Python. Everything that the server has imported is then exempt from garbage collection: one in a process with PyTorch
costs more than ten training steps.
"""

import gc
import tempfile
from pathlib import Path

import yaml
from conftest import RUN_YAML

from lightning_mvar import MVARConfig, ScaleSchedule
from lightning_mvar.cli.help import COMMANDS, signatures_of
from lightning_mvar.cli.training import parse_command
from lightning_mvar.models.costs import costs_of

text = RUN_YAML.format(tokenizer="tokenizer")
options = yaml.safe_load(text)["model"]["network"]
costs_of(MVARConfig(**options | {"schedule": ScaleSchedule(tuple(options["schedule"]["side_lengths"]))}))
for command in COMMANDS:
    signatures_of(command)
with tempfile.TemporaryDirectory() as folder:
    config = Path(folder, "run.yaml")
    config.write_text(text)
    parse_command(["fit", "--config", str(config), "--seed_everything", "false"])
gc.collect()
gc.freeze()
