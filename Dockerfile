# One image for CPU and GPU, by the index of the torch wheels. We have not built it: there is no Docker where we work.
#   docker build -t secvec .                                                             CPU
#   docker build -t secvec --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .     GPU
#   docker run --rm -v "$PWD/outputs:/runs/outputs" secvec secvec-train -m experiment=demo       (GPU: --gpus all)
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/secvec
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY conf ./conf
COPY hydra_plugins ./hydra_plugins
COPY secvec ./secvec
RUN pip install --no-cache-dir -c constraints.txt '.[search,judges,lm-eval]'

RUN useradd --create-home secvec && mkdir -p /runs/outputs && chown -R secvec /runs
USER secvec
WORKDIR /runs
CMD ["secvec-train", "--help"]
