# Slipstream's image, for BuildKit: docker build --target cpu . (or --target cuda). Arguments: docs/operations/image.md
#
# Python packages come at the versions of constraints.txt, with which the test suite passed. A tag may be moved: name the
# base image that you have looked at, PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++: CPU kernels are built for the processor they run on, and Triton's launchers, at first use (decision 27).
# wget: KubeRay's probes are `bash -c "wget … | grep success"`. tini: reaps what Ray's processes leave behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini wget \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 slipstream \
    && useradd --uid 1000 --gid 1000 --home-dir /var/lib/slipstream --create-home --shell /bin/bash slipstream
ENV PATH=/opt/slipstream/bin:$PATH

# What is installed, without this package: a layer of gigabytes that only pyproject.toml and constraints.txt change.
FROM base AS build
WORKDIR /build
COPY constraints.txt pyproject.toml ./
RUN python3 -m venv /opt/slipstream \
    && python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
       > requirements.txt

# TORCH_INDEX: pip's own index has CUDA builds of torch for Linux; CPU builds are on an index of PyTorch's.
FROM build AS packages-cpu
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && pip check \
    && python -c "import torch; assert torch.version.cuda is None, 'a CUDA build of torch: TORCH_INDEX must name an index of CPU builds'"

FROM build AS packages-cuda
ARG TORCH_INDEX=
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch \
    && pip install --constraint constraints.txt --requirement requirements.txt \
    && pip check \
    && python -c "import torch; assert torch.version.cuda, 'a CPU build of torch: TORCH_INDEX must name an index of CUDA builds'"

FROM build AS wheel
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/wheel && /opt/wheel/bin/pip install --constraint constraints.txt hatchling
COPY LICENSE README.md ./
COPY platform platform
COPY adapter_registry adapter_registry
COPY deployments deployments
COPY examples/adapters examples/adapters
RUN /opt/wheel/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

FROM build AS sbom
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/sbom && /opt/sbom/bin/pip install --constraint constraints.txt cyclonedx-bom

FROM base AS runtime
# HOME is the one folder that is written to, besides /tmp: data, caches of Hugging Face and Triton, and the CPU kernels.
ENV HOME=/var/lib/slipstream \
    SLIPSTREAM_HOME=/var/lib/slipstream \
    SLIPSTREAM_HOST=0.0.0.0 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy:middlewares
WORKDIR /var/lib/slipstream
# KubeRay starts `ray start` in place of these two; Kubernetes has probes of its own and does not read HEALTHCHECK.
ENTRYPOINT ["tini", "--", "slipstream"]
CMD ["serve"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('PORT') or 8000}/healthz\", timeout=4)"]

FROM runtime AS cpu
COPY --link --from=packages-cpu /opt/slipstream /opt/slipstream
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps --no-index /dist/*.whl
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom --mount=type=bind,from=build,source=/build,target=/build \
    mkdir -p /usr/share/doc/slipstream \
    && /opt/sbom/bin/cyclonedx-py environment --spec-version 1.6 --output-reproducible --pyproject /build/pyproject.toml \
       --output-file /usr/share/doc/slipstream/sbom.cdx.json /opt/slipstream/bin/python
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="slipstream" \
      org.opencontainers.image.description="Many tenants' Turbo LoRA adapters on one shared base model (CPU)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000

FROM runtime AS cuda
# What NVIDIA's container runtime reads; the CUDA libraries themselves are packages that torch asks for.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --link --from=packages-cuda /opt/slipstream /opt/slipstream
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist pip install --no-cache-dir --no-deps --no-index /dist/*.whl
RUN --mount=type=bind,from=sbom,source=/opt/sbom,target=/opt/sbom --mount=type=bind,from=build,source=/build,target=/build \
    mkdir -p /usr/share/doc/slipstream \
    && /opt/sbom/bin/cyclonedx-py environment --spec-version 1.6 --output-reproducible --pyproject /build/pyproject.toml \
       --output-file /usr/share/doc/slipstream/sbom.cdx.json /opt/slipstream/bin/python
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="slipstream" \
      org.opencontainers.image.description="Many tenants' Turbo LoRA adapters on one shared base model (CUDA)" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
USER 1000:1000

# docker build --target sbom-cpu --output . writes the software bill of materials (CycloneDX) of a build.
FROM scratch AS sbom-cpu
COPY --from=cpu /usr/share/doc/slipstream/sbom.cdx.json /

FROM scratch AS sbom-cuda
COPY --from=cuda /usr/share/doc/slipstream/sbom.cdx.json /
