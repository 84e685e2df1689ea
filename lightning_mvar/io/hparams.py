"""Writes and reads the rows and columns of TensorBoard's hyperparameter table."""

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


def columns_summary(values: Mapping[str, Any], metrics: Collection[str], first: Collection[str]) -> Summary:
    """Returns the table's columns, even those empty in this run: TensorBoard uses the columns of one run for all.

    Args:
        values: hyperparameters by name: numbers, strings, booleans or None.
        metrics: tags of the scalars whose latest values the table shows.
        first: hyperparameters shown first; the table has room for five.
    """
    hparam_infos = [
        api_pb2.HParamInfo(name=name, type=TYPES[type(value)], differs=name in first) for name, value in values.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=hparam_infos, metric_infos=[Metric(tag).as_proto() for tag in metrics])
    description = metadata.create_summary_metadata(HParamsPluginData(experiment=experiment))
    return Summary(
        value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=description, tensor=metadata.NULL_TENSOR)]
    )


def row_summary(values: Mapping[str, Any]) -> Summary:
    """Returns a run's hyperparameters, except those that are None.

    Without a trial name, runs with equal hyperparameters still get separate rows.
    """
    return hparams_pb({name: value for name, value in values.items() if value is not None}, trial_id="")


def end_summary(status: int) -> Summary:
    """Returns a run's status: TensorBoard's api_pb2.STATUS_SUCCESS, STATUS_FAILURE or STATUS_RUNNING."""
    content = HParamsPluginData(session_end_info=SessionEndInfo(status=status))
    description = metadata.create_summary_metadata(content)
    return Summary(
        value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=description, tensor=metadata.NULL_TENSOR)]
    )


def read_row(events: EventAccumulator) -> dict[str, Any]:
    """Returns the hyperparameters of a run whose events are loaded; numbers come back as floats.

    Raises:
        KeyError: if the run has none.
        google.protobuf.message.DecodeError: if they are damaged.
    """
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)[metadata.SESSION_START_INFO_TAG]
    session = HParamsPluginData.FromString(content).session_start_info
    kinds = {name: value.WhichOneof("kind") for name, value in session.hparams.items()}
    return {name: getattr(session.hparams[name], kind) for name, kind in kinds.items() if kind is not None}
