"""A run's row in TensorBoard's table of hyperparameters, the table's columns, and reading a row back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import Metric, hparams_pb

TYPES = {
    bool: api_pb2.DATA_TYPE_BOOL,
    int: api_pb2.DATA_TYPE_FLOAT64,
    float: api_pb2.DATA_TYPE_FLOAT64,
    str: api_pb2.DATA_TYPE_STRING,
    type(None): api_pb2.DATA_TYPE_UNSET,
}


def columns(values: Mapping[str, Any], metrics: Collection[str], first: Collection[str]) -> Summary:
    """The table's columns, those that are empty in this run included: TensorBoard takes one run's for all.

    Args:
        values: numbers, words, truths and None by the hyperparameter's name.
        metrics: tags of the scalars whose latest values are shown.
        first: hyperparameters that the table begins with: it has room for five.
    """
    infos = [
        api_pb2.HParamInfo(name=name, type=TYPES[type(value)], differs=name in first) for name, value in values.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=[Metric(tag).as_proto() for tag in metrics])
    about = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
    return Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about, tensor=metadata.NULL_TENSOR)])


def row(values: Mapping[str, Any]) -> Summary:
    """A run's hyperparameters, without those that are None.

    Left without a trial's name, each run has a row of its own, though another had the same hyperparameters.
    """
    return hparams_pb({name: value for name, value in values.items() if value is not None}, trial_id="")


def ended(status: int) -> Summary:
    """That a run has ended so: one of TensorBoard's api_pb2.STATUS_SUCCESS, STATUS_FAILURE and STATUS_RUNNING."""
    content = HParamsPluginData(session_end_info=SessionEndInfo(status=status))
    about = metadata.create_summary_metadata(content)
    return Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)]
    )


def read_row(events: EventAccumulator) -> dict[str, Any]:
    """The hyperparameters of a run whose events have been loaded; numbers come back as floats.

    Raises:
        KeyError: if none were written.
    """
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    session = HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in session.hparams.items()}
