# docker build -t share-manager .
# `make image` builds the same with buildah and a base made by debootstrap, for machines that reach no image registry.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
COPY deploy/apt/build.txt /tmp/packages.txt
RUN apt-get update -qq \
    && sed 's/#.*//' /tmp/packages.txt | xargs apt-get install -qq --yes --no-install-recommends
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt LICENSE README.md ./
COPY engine engine
COPY ganesha ganesha
COPY share_manager share_manager
RUN python3 -m venv /opt/share-manager \
    && /opt/share-manager/bin/python -m pip install -qq --no-input --no-cache-dir --disable-pip-version-check \
        -c constraints.txt . \
    && /opt/share-manager/bin/python -m pip uninstall -qq --yes setuptools pip

FROM ${BASE}
LABEL org.opencontainers.image.title="share-manager" \
      org.opencontainers.image.description="ReadWriteMany NFS shares on replicated block volumes" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY deploy/apt/runtime.txt deploy/apt/node.txt /tmp/packages/
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -qq \
    && sed 's/#.*//' /tmp/packages/*.txt | xargs apt-get install -qq --yes --no-install-recommends \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /usr/share/doc /usr/share/man /tmp/packages
# ganesha finds the filesystem of an export there; not every runtime makes it
RUN ln -sf /proc/self/mounts /etc/mtab
COPY --from=build /opt/share-manager /opt/share-manager
ENV PATH=/opt/share-manager/bin:$PATH \
    PYTHONUNBUFFERED=1
EXPOSE 2049
STOPSIGNAL SIGTERM
ENTRYPOINT ["share-manager"]
