#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes: the tests of CUDA, the main job, the speed benchmark. From any folder:
#
#   benchmarks/gpu_check.sh [page]      the page of the speed benchmark, by default docs/speed-gpu.md
#
# The torch that is installed is the one that is tried. A part that fails does not keep the next from running; one that
# takes longer than its share is stopped. The speed benchmark has the time that the others leave: it holds the contests
# with goals first, writes its page after each, and begins none that would not end. PYTHON names another python, WORKERS
# the tests' processes, SPEED other options of the speed benchmark.
set -uo pipefail
page=$(realpath -m "${1:-$(dirname "$0")/../docs/speed-gpu.md}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python || echo python3)}
deadline=440 # seconds
longest=40   # seconds of the speed benchmark's longest contest, a compilation
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
    # At their time's end pytest waits 10 s for its processes, and then says which tests failed.
    timeout -s INT -k 30 170 "$python" -m pytest "${options[@]}" --durations=5 -m cuda \
        tests/test_cuda.py tests/test_cuda_training.py tests/test_cuda_fit.py tests/test_cuda_annealed.py \
        tests/test_files.py
}

speed() {
    grep -qs '^<!-- tables -->' "$page" || printf '\n## Times\n\nBy `benchmarks/gpu_check.sh`.\n\n%s\n%s\n' \
        '<!-- tables -->' '<!-- end of tables -->' >>"$page"
    local left=$((deadline - SECONDS))
    # shellcheck disable=SC2086  # several options
    timeout -s INT -k 10 $left "$python" -m benchmarks speed --device cuda --page "$page" \
        --seconds $((left - longest)) ${SPEED:-}
}

main_job() {
    timeout -s INT -k 10 60 "$python" -m benchmarks --quick --device cuda
}

"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "gpu_check: expected a Python whose PyTorch finds a CUDA device ($python); PYTHON=... names another" >&2
    exit 2
}
install() {
    timeout 60 "$python" -m pip install --quiet --retries 1 --timeout 5 -e ".[bench,files,test$1]"
}

has pytest hypothesis scipy mpmath typer rich matplotlib safetensors ||
    part "what the tests and benchmarks need" install ""
has zuko pyro nflows normflows || install ,peers || echo "gpu_check: some public libraries are not timed"
part "tests of CUDA" cuda_tests
part "main job" main_job
part "speed benchmark" speed
printf '\n== all: %d s; failed: %s\n' "$SECONDS" "${failed[*]:-none}"
exit $((${#failed[@]} > 0))
