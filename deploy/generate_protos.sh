#!/bin/sh
# Usage: generate_protos.sh PYTHON OUT  -- writes OUT/lemix/{v1,internal/v1}/*_pb2*
set -eu
python=$1
out=$2
PATH=$(dirname "$python"):$PATH # protoc finds protoc-gen-mypy_grpc there
mkdir -p "$out"
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" $(find protos -name '*.proto' | sort)
# Only service files: the others would give empty stubs.
"$python" -m grpc_tools.protoc -I protos --grpc_python_out="$out" --mypy_grpc_out=quiet:"$out" \
  $(find protos -name '*_service.proto' | sort)
