#!/bin/bash
# Run benchmarks/gpu.py from the repository's root on a machine that has torch and transformers and no network.
#   bash benchmarks/gpu.sh [FOLDER] [ARGUMENTS of benchmarks.gpu]
# WHEELS: a folder of wheels of what the machine lacks (pydantic, structlog, regex, ...); they are unpacked, not installed.
set -u
out=${1:-build/gpu}
shift $(($# > 0))
mkdir -p "$out"
if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install --no-index --no-deps --target "$out/site" "$WHEELS"/*.whl >&2 || exit 2
  export PYTHONPATH="$out/site${PYTHONPATH:+:$PYTHONPATH}"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$out/machine.txt"
timeout --kill-after=10 470 python3 -m benchmarks.gpu --out "$out" "$@"
code=$?
cat "$out/gpu.md" 2>/dev/null
exit $code
