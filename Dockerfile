# benthic serve in a container. The model's folder and the keys are mounted, never built in:
#
#   docker build --tag benthic .
#   docker run --rm --publish 127.0.0.1:8000:8000 --read-only --tmpfs /tmp --cap-drop ALL \
#       --volume "$PWD/runs/demo/model:/model:ro" --volume "$PWD/keys:/run/secrets/api-keys:ro" \
#       benthic --api-key-file /run/secrets/api-keys
#
# On a GPU: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 --tag benthic:cuda .
# and docker run --gpus all ... benthic:cuda --device cuda
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /source
RUN python -m venv /opt/benthic
COPY constraints.txt ./
# torch first: it is large, and seldom changes. The pinned version may not be built for every accelerator.
RUN /opt/benthic/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" 'torch>=2.11'
COPY pyproject.toml README.md LICENSE ./
COPY benthic benthic
RUN grep -v '^torch==' constraints.txt > pinned.txt \
    && /opt/benthic/bin/pip install --no-cache-dir --constraint pinned.txt '.[serve]'

FROM python:${PYTHON_VERSION}-slim
COPY --from=build /opt/benthic /opt/benthic
ENV PATH=/opt/benthic/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin benthic
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# A large model takes minutes to load; until then the server answers 503.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Listening on 0.0.0.0 is refused without keys, unless --open says that everybody may come in.
ENTRYPOINT ["benthic", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
