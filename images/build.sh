#!/usr/bin/env bash
# Builds the images with docker, podman or buildah, whichever is there.
#   images/build.sh [router] [operator] [worker]      all three by default
#   REGISTRY=registry.example.com/team  goes before the names      TAG=...  default: the chart's
#   BUILD_ARGS="BASE=... INDEX=https://download.pytorch.org/whl/cpu"  as the Dockerfiles say
set -euo pipefail
cd "$(dirname "$0")/.."

builder=${BUILDER:-$(for one in docker podman buildah; do command -v $one && break; done || true)}
test -n "$builder" || { echo "make images needs docker, podman or buildah, and found none" >&2; exit 1; }
tag=${TAG:-$(sed -n 's/^appVersion: *"\{0,1\}\([^"]*\)"\{0,1\}$/\1/p' charts/shoal/Chart.yaml)}
arguments=()
for argument in ${BUILD_ARGS:-}; do arguments+=(--build-arg "$argument"); done

test $# -gt 0 || set -- router operator worker
for component; do
  name=${REGISTRY:+$REGISTRY/}shoal-$component:$tag
  "$builder" build ${arguments[@]+"${arguments[@]}"} --tag "$name" --file "images/Dockerfile.$component" .
  echo "$name"
done
