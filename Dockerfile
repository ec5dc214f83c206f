# A GPU machine's environment: docker build -t megatron-hapo . && docker run --gpus all --shm-size 64g megatron-hapo train ...
# A devel image, because SGLang compiles kernels when an engine starts, and Transformer Engine when it is installed.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive CUDA_HOME=/usr/local/cuda VENV=/opt/megatron-hapo
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-dev python3.12-venv g++ git libibverbs1 librdmacm1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*

# The environment first: it changes less often than the code.
WORKDIR /src
COPY requirements requirements
COPY tools tools
COPY setup.py pyproject.toml README.md ./
COPY megatron_hapo megatron_hapo
COPY sglang_ext sglang_ext
RUN PYTHON=/usr/bin/python3.12 tools/set_up_gpu.sh "$VENV"

# Its torch part is built against the torch that is installed; in isolation it would be built against another one.
ARG MAX_JOBS=8
RUN MAX_JOBS=$MAX_JOBS NVTE_FRAMEWORK=pytorch "$VENV/bin/uv" pip install --python "$VENV/bin/python" \
    --no-build-isolation --constraints requirements/gpu/lock.txt "$(sed -n 's/.*"te": \["\([^"]*\)"\].*/\1/p' setup.py)"

COPY . .
ENV PATH="$VENV/bin:$PATH"
ENTRYPOINT ["megatron-hapo"]
