"""Shards and archives in an S3 bucket are read like local ones; credentials and endpoint come from the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
import torch
from conftest import prepare_run, write_token_shards
from moto.server import ThreadedMotoServer

from lightning_mvar import Tokenizer
from lightning_mvar.cli import run
from lightning_mvar.data.tokens.sources import open_shards
from lightning_mvar.data.tokens.stream import TokenBatch, TokenLoader, TokenStream
from lightning_mvar.errors import InputError
from lightning_mvar.io import fetch as fetching


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns the name of a new bucket, which the environment gives access to."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("no_proxy", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fetching, "FIRST_WAIT_S", 0.01)
    monkeypatch.chdir(tmp_path)
    name = tmp_path.name.replace("_", "-")
    boto3.client("s3").create_bucket(Bucket=name)
    return name


def upload(folder: Path, bucket: str, prefix: str) -> None:
    client = boto3.client("s3")
    for path in folder.iterdir():
        client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def batches(location: str, workers: int = 0) -> list[TokenBatch]:
    shards = open_shards(location, "cache", 0)
    return [*TokenLoader(TokenStream(shards, shards.manifest(), 8, 0, 30, 0, 1), workers, pin_memory=False)]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_equal_those_of_the_folder(bucket: str, tmp_path: Path, workers: int) -> None:
    write_token_shards(tmp_path / "shards", "abc", [20, 20, 7])
    upload(tmp_path / "shards", bucket, "path/train")
    for ours, theirs in zip(batches(f"s3://{bucket}/path/train", workers), batches("shards"), strict=True):
        assert ours.own is None
        assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
    assert len([*(tmp_path / "cache").glob("*.tar")]) == 3


def test_mistakes_name_the_address(bucket: str, tmp_path: Path) -> None:
    manifest = write_token_shards(tmp_path / "shards", "abc", [20, 20])
    upload(tmp_path / "shards", bucket, "train")
    shards = open_shards(f"s3://{bucket}/train", tmp_path / "cache", 1)
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="train/000001.tar", Body=bytes(10_000_000))
    with pytest.raises(InputError, match=rf"s3://{bucket}/train/000001\.tar sends more than the \d+ bytes that are"):
        shards.fetch(manifest.shards[1])
    client.delete_object(Bucket=bucket, Key="train/000001.tar")
    with pytest.raises(InputError, match=r"000001\.tar cannot be read \(there is no such file\), in 2 attempt"):
        shards.fetch(manifest.shards[1])
    with pytest.raises(InputError, match=r"s3://no-such-bucket/manifest\.json cannot be read \(.*\), in 1 attempt"):
        open_shards("s3://no-such-bucket", tmp_path / "cache", 0).manifest()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_fit_reads_a_bucket(bucket: str, tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path) -> None:
    prepare_run(tmp_path, tokenizer, tokenizer_folder, draws=False)
    upload(tmp_path / "shards", bucket, "train")
    remote = ["--data.train", f"s3://{bucket}/train", "--data.val", f"s3://{bucket}/train", "--data.cache_dir", "cache"]
    assert run(["fit", "--config", "run.yaml", "--trainer.max_steps", "2", *remote]) == 0
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    assert len([*(tmp_path / "cache").glob("*.tar")]) == 3
