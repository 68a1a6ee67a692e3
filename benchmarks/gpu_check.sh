#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes: the tests of CUDA, the speed benchmark, the main job. From any folder:
#
#   benchmarks/gpu_check.sh [page]      the page of the speed benchmark, by default docs/speed-gpu.md
#
# The torch that is installed is the one that is tried. A part that fails does not keep the next from running; one that
# takes longer than its share is stopped. PYTHON names another python, WORKERS the tests' processes, SPEED other options
# of the speed benchmark.
set -uo pipefail
page=$(realpath -m "${1:-$(dirname "$0")/../docs/speed-gpu.md}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python}
failed=()

has() {
    "$python" -c "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]" "$@" 2>/dev/null
}

part() {
    local name=$1 start=$SECONDS status
    shift
    printf '\n== %s\n' "$name"
    "$@"
    status=$?
    [ $status -eq 0 ] || failed+=("$name")
    printf '== %s: %d s, status %d\n' "$name" $((SECONDS - start)) $status
}

cuda_tests() {
    local options=(-q -p no:cacheprovider)
    ! has xdist || options+=(-n "${WORKERS:-12}" --dist worksteal)
    timeout -s INT -k 10 190 "$python" -m pytest "${options[@]}" --durations=5 \
        tests/test_cuda.py tests/test_cuda_training.py tests/test_cuda_fit.py tests/test_cuda_annealed.py
}

speed() {
    [ -e "$page" ] || printf '# Speed on a GPU\n\nAs [on a CPU](speed.md), by `benchmarks/gpu_check.sh`.\n\n%s\n%s\n' \
        '<!-- tables -->' '<!-- end of tables -->' >"$page"
    # shellcheck disable=SC2086  # several options
    timeout -s INT -k 10 220 "$python" -m benchmarks speed --device cuda --page "$page" ${SPEED:---reps 20}
}

main_job() {
    timeout 70 "$python" -m benchmarks --quick --device cuda
}

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "gpu_check: expected a Python whose PyTorch finds a CUDA device ($python); PYTHON=... names another" >&2
    exit 2
}
has pytest hypothesis scipy mpmath typer rich matplotlib safetensors ||
    part "what the tests and benchmarks need" "$python" -m pip install --quiet -e '.[bench,files,test]'
part "tests of CUDA" cuda_tests
part "speed benchmark" speed
part "main job" main_job
printf '\n== all: %d s; failed: %s\n' "$SECONDS" "${failed[*]:-none}"
exit $((${#failed[@]} > 0))
