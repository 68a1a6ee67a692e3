#!/usr/bin/env bash
# The Sylvester paper's models on static MNIST as far as 8 minutes of a GPU go, then log p(x) of the first of them between
# two bounds, on 100 images of its own, within 2 minutes more; and the page of it. From any folder:
#
#   benchmarks/gpu_images.sh [page]      by default docs/images-gpu.md
#
# Every model gets the same minutes of training with captured steps, a shorter KL warm-up than the paper's, and fewer
# importance samples: the page says so. One that fails does not keep the next from running; a second call goes on where
# the first one was stopped. Settings by the environment: PYTHON, PRESETS, MINUTES (of each training), OPTIONS (of
# every run), SANDWICH (its options), RUNS (a folder). Without a GPU, to try it out:
#
#   OPTIONS="--device cpu --data digits --epochs 1 --samples 25 --images 20 --trusted-images 0" \
#       SANDWICH="--count 3 --chains 2 --temperatures 4 --samples 30" benchmarks/gpu_images.sh page.md
set -uo pipefail
page=$(realpath -m "${1:-$(dirname "$0")/../docs/images-gpu.md}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python || echo python3)}
presets=${PRESETS:-sylvester-vae sylvester-planar sylvester-iaf sylvester-osnf}
runs=$(realpath -m "${RUNS:-runs/gpu-images}")
options=${OPTIONS:---device cuda --kl-warmup 10 --samples 200 --pairs 20000}
seconds=${SECONDS_EACH:-150} # of each run, with what is not training
sandwich=${SANDWICH:---device cuda --count 100 --chains 8 --temperatures 500}
failed=()

train() {
    local name=$1 folder="$runs/$1" status
    printf '\n== %s\n' "$name"
    if [ -e "$folder/results.json" ]; then
        timeout -s INT -k 20 "$seconds" "$python" -m benchmarks images --resume "$folder" --no-pictures
    else
        # shellcheck disable=SC2086  # several options
        timeout -s INT -k 20 "$seconds" "$python" -m benchmarks images --preset "$name" \
            --minutes "${MINUTES:-1.3}" $options --no-pictures --out "$folder"
    fi
    status=$?
    [ $status -eq 0 ] || failed+=("$name")
    printf '== %s: %d s so far, status %d\n' "$name" "$SECONDS" "$status"
}

bound() {
    local folder
    folder=$(realpath --relative-to=. "$runs/${presets%% *}") # as it stands on the page
    printf '\n== sandwich of %s\n' "$folder"
    rm -rf "$runs-sandwich" # of the script's run before
    # shellcheck disable=SC2086  # several options
    timeout -s INT -k 20 "${SECONDS_SANDWICH:-150}" "$python" -m benchmarks sandwich "$folder" $sandwich \
        --out "$runs-sandwich" --page "$page" --mark sandwich || failed+=("sandwich")
}

[[ $options != *cuda* ]] || "$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "gpu_images: expected a Python whose PyTorch finds a CUDA device ($python); PYTHON=... names another" >&2
    exit 2
}
needs='import matplotlib, rich, safetensors, typer' # and pooch, where the images have to be downloaded
"$python" -c "$needs, pooch" 2>/dev/null ||
    timeout 60 "$python" -m pip install --quiet --retries 1 --timeout 5 -e '.[bench]' || "$python" -c "$needs" || exit 1
for preset in $presets; do
    train "$preset"
done
[ -e "$page" ] || printf '# Models of published tables on a GPU\n\nBy `benchmarks/gpu_images.sh`.\n\n%s\n%s\n' \
    '<!-- tables -->' '<!-- end of tables -->' >"$page"
grep -q '<!-- sandwich -->' "$page" || printf '\n## log p(x) between two bounds\n\n%s\n%s\n' \
    '<!-- sandwich -->' '<!-- end of sandwich -->' >>"$page"
"$python" -m benchmarks images "$runs"/*/ --page "$page" || failed+=("page")
bound
printf '\n== all: %d s; failed: %s\n' "$SECONDS" "${failed[*]:-none}"
exit $((${#failed[@]} > 0))
