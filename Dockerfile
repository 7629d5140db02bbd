# The command `ovcalib` for CPUs, with everything that it needs to quantize PyTorch, ONNX and OpenVINO models.
#   docker build -t ovcalib .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" ovcalib quantize model.onnx -o runs/model
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ovcalib ovcalib
COPY gan gan
COPY export export
# PyPI's torch brings CUDA libraries. The CPU wheels come from PyTorch's index, everything else from PyPI.
RUN python -m venv /opt/ovcalib \
    && /opt/ovcalib/bin/pip install --no-cache-dir --no-deps -c constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch torchvision \
    && /opt/ovcalib/bin/pip install --no-cache-dir -c constraints.txt '.[quantize]'

FROM python:3.12-slim
COPY --from=build /opt/ovcalib /opt/ovcalib
RUN useradd --create-home ovcalib && install --directory --owner ovcalib /work
# HOME and the cache are writable for whichever user `docker run --user` names.
ENV PATH=/opt/ovcalib/bin:$PATH HOME=/tmp OVCALIB_CACHE=/tmp/ovcalib
USER ovcalib
WORKDIR /work
ENTRYPOINT ["ovcalib"]
CMD ["--help"]
