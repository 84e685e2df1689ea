# The command line on NVIDIA GPUs. The host needs a driver for CUDA 13 and the NVIDIA container toolkit. Linted with
# hadolint, not built yet.
#   docker build -t lightning-mvar .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" lightning-mvar sample --ckpt_path var-d16 --out samples.npz
FROM python:3.11-slim

# Triton compiles this package's kernels with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir torch==2.13.0

COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[demo,report,serve,sweep]"

# Weights from the Hub are kept in the mounted folder.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility HF_HOME=/work/.cache/huggingface
WORKDIR /work
ENTRYPOINT ["lightning-mvar"]
