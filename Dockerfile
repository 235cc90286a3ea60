# An image with `stca`, built from this repository alone: docker build -t stca .
# docker run -p 8000:8000 -p 8001:8001 -v ./bundle:/bundle:ro stca serve ranker=/bundle
# `--build-arg EXTRAS=serve,export,report` adds what export and report need; the default is what serving needs.
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY src src
COPY export export
COPY plugins plugins
COPY runtime runtime
COPY calibration calibration
COPY examples examples
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.12-slim
ARG EXTRAS="serve"
COPY --from=wheel /wheel /wheel
COPY constraints.txt /wheel/constraints.txt
RUN wheel=$(ls /wheel/*.whl) && pip install --no-cache-dir -c /wheel/constraints.txt "${wheel}${EXTRAS:+[$EXTRAS]}" \
    && rm -r /wheel && useradd --create-home stca
USER stca
WORKDIR /home/stca
# `stca serve` in a container is asked from outside; the admin port stays within it unless STCA_SERVE_ADMIN_HOST says so.
ENV STCA_SERVE_HOST=0.0.0.0
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
ENTRYPOINT ["stca"]
CMD ["--help"]
