#!/bin/sh
# Generates clients/python/tunesmith from proto/. The toolchain is pinned to the lowest supported runtime pair, so that
# what it writes imports on every newer one. Runs in a throwaway environment: the product's own never needs protoc.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-$root/clients/python}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check grpcio-tools==1.74.0 mypy-protobuf==5.1.0
rm -rf "$out/tunesmith"
mkdir -p "$out"
cd "$root/proto"
find tunesmith -name '*.proto' | sort > "$work/files"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" -m grpc_tools.protoc -I . \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    $(cat "$work/files")
for directory in tunesmith tunesmith/common tunesmith/common/v1 tunesmith/control tunesmith/control/v1 tunesmith/gpu tunesmith/gpu/v1; do
    printf '"""Generated from proto/; never edited."""\n' > "$out/$directory/__init__.py"
done
printf '' > "$out/tunesmith/py.typed"
# Files without a service get an empty grpc module; it would only be noise.
for file in "$out"/tunesmith/common/v1/*_pb2_grpc.py*; do rm -f "$file"; done
