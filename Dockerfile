# CPU:   docker build -t thaw .
# CUDA:  docker build -t thaw --build-arg TORCH= .             torch as PyPI has it; or TORCH=cu130, another CUDA version
#
# docker run --rm -v thaw-logs:/thaw/logs thaw train.py experiment=vit_linear_probe
# docker run --rm -v thaw-logs:/thaw/logs -p 8000:8000 thaw serve.py ckpt=last host=0.0.0.0
#   under another name than localhost or an address, such as a service's:  hosts=[digits]
# With own pictures:  -v "$PWD/pets:/pets:ro" ... data.dir=/pets     with GPUs:  --gpus all ... trainer=gpu
ARG BASE=python:3.13-slim
FROM ${BASE}

RUN useradd --create-home --uid 1000 thaw && install -d -o thaw /thaw /thaw/logs /thaw/data
WORKDIR /thaw
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

# Libraries first: their layer is built again only when pyproject.toml or constraints.txt changes.
ARG TORCH=cpu
ARG EXTRAS=export,serve
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir src && python -m pip install -c constraints.txt -e ".[${EXTRAS}]" \
    ${TORCH:+--extra-index-url https://download.pytorch.org/whl/${TORCH}}

COPY --chown=thaw . .
USER 1000
ENTRYPOINT ["python"]
CMD ["train.py", "--help"]
