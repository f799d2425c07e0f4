#!/usr/bin/env bash
# The tests on a GPU and what monitoring costs there, from the source tree as it is: gpu.txt and gpu.json in $OUT, or here.
# A rehearsal on the CPU: BNMONITOR_DEVICE=cpu tests/gpu/run.sh --quick --rounds 2
# Arguments go to examples/overhead_cuda.py. Fails if a test does; missed targets are in gpu.txt.
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONUNBUFFERED=1
export BNMONITOR_DEVICE=${BNMONITOR_DEVICE:-cuda} OUT=${OUT:-$PWD}
python=${PYTHON:-python3} junit=$(mktemp)

{
    echo "$(date -u +%FT%TZ), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), device $BNMONITOR_DEVICE"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null
    $python - <<'PYTHON'
import platform, lightning, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
      f"cuDNN {torch.backends.cudnn.version()}, lightning {lightning.__version__}")
PYTHON
    echo
    # Without pytest-xdist: one process has the device to itself.
    timeout "${TESTS_SECONDS:-200}" $python -m pytest -o addopts=--strict-markers -q --tb=short -p no:cacheprovider \
        --show-capture=no --disable-warnings --durations=8 -o faulthandler_timeout=100 --junitxml="$junit" tests/gpu
    echo $? >"$junit.rc"
    echo
    timeout "${OVERHEAD_SECONDS:-280}" $python examples/overhead_cuda.py --device "$BNMONITOR_DEVICE" --json "$OUT/gpu.json" "$@"
    echo "examples/overhead_cuda.py ended with $?."
} 2>&1 | tee "$OUT/gpu.txt"

$python - "$junit" "$OUT/gpu.json" <<'PYTHON'
"""Adds the outcomes of the tests to the numbers."""
import json, sys
from pathlib import Path
from xml.etree import ElementTree

junit, numbers = map(Path, sys.argv[1:])
cases = ElementTree.parse(junit).iter("testcase") if junit.stat().st_size else ()
outcomes = {
    f"{case.get('classname')}::{case.get('name')}": {
        "outcome": next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed"),
        "seconds": float(case.get("time")),
    }
    for case in cases
}
known = json.loads(numbers.read_text()) if numbers.exists() else {}
numbers.write_text(json.dumps({**known, "tests": outcomes}, indent=1))
PYTHON
rc=$(cat "$junit.rc")
rm -f "$junit" "$junit.rc"
exit "$rc"
