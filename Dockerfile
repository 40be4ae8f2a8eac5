# pipeline on an NVIDIA GPU.
#
#   docker build -t pipeline .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/data" pipeline run experiment.yaml
#
# /data is the folder that commands run in: put the experiment's YAML, local models and data there; runs/ appears in it.
# What is downloaded from the hub is kept in /data/.huggingface. Gated models need a login: add -e HF_TOKEN to `docker run`.

# torch's wheel brings its own CUDA libraries; the image's CUDA only has to be of the same major version (the driver decides
# what runs). For an older driver build with another image and, in constraints.txt, a torch of the same CUDA version.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
FROM ${CUDA_IMAGE}

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:${PATH}

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv

# torch first and alone: it is most of the image and changes least. The default index has the CUDA build of the version in
# constraints.txt; with an index of CPU builds beside it pip would take the CPU build, so the build stops on one.
WORKDIR /opt/pipeline
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch \
    && python -c "import torch; assert torch.version.cuda, 'this is a CPU build of torch'"

COPY pyproject.toml README.md ./
COPY pipeline pipeline
COPY stages stages
RUN pip install --constraint constraints.txt '.[eval]' \
    && python -m compileall -q /opt/venv/lib/python3.12/site-packages/pipeline /opt/venv/lib/python3.12/site-packages/stages

# no root at run time, and nothing outside /data and /tmp is written: any other --user works as well
ENV HOME=/tmp \
    USER=pipeline \
    HF_HOME=/data/.huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin pipeline \
    && mkdir /data \
    && chown pipeline:pipeline /data
USER pipeline
VOLUME /data
WORKDIR /data

ENTRYPOINT ["pipeline"]
CMD ["--help"]
