# The pipeline in a container: `docker build -t proximal .`, then `docker run proximal` does what `make align` does.
# The tag names a version. To pin the very image, put its digest here: docker buildx imagetools inspect python:3.11.14-slim-bookworm
FROM python:3.11.14-slim-bookworm

# Debian keeps one version of a package at a time: a pinned one would not be found for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

# The folder is made here: not every builder gives one that WORKDIR makes to USER.
RUN useradd --create-home --uid 1000 proximal && install --directory --owner=1000 --group=1000 /home/proximal/checkout
USER 1000:1000
WORKDIR /home/proximal/checkout

# Before the code, so that a changed line does not install everything again.
COPY --chown=1000:1000 Makefile requirements.lock requirements-torch.txt ./
RUN make .venv/ready PYTHON=python3

COPY --chown=1000:1000 . .
# The lock, copied again, may look newer than what was installed from it: make would install it again, at every start.
RUN touch .venv/ready
# DVC asks for git, unless it is told that there is none (a context without .git).
RUN git rev-parse --quiet --verify HEAD || .venv/bin/dvc config --local core.no_scm true

ENTRYPOINT ["make"]
CMD ["align"]
