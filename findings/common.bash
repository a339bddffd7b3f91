# What every finding needs: an environment of its own with pinned packages, and a check that says what has changed.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT

# Installs the given packages, without their dependencies when the first argument is --no-deps.
install() {
  [ -d "$here/venv" ] || "${PYTHON:-python3}" -m venv "$here/venv"
  "$here/venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"
  site=$("$here/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
}

# Installs nvcc and what it needs to compile a kernel, for the CUDA release that the arguments pin.
install_nvcc() {
  install --no-deps "nvidia-cuda-nvcc==$1" "nvidia-cuda-crt==$1" "nvidia-nvvm==$1" "nvidia-cuda-runtime==$2"
  nvcc=$site/nvidia/cu13/bin/nvcc
  "$nvcc" --version | grep -o "release.*"
}

python() { "$here/venv/bin/python" -W ignore "$@"; }

# expect TEXT PATTERN: the text must have a line that matches the extended regular expression.
expect() {
  grep -Eq -- "$2" <<< "$1" || { printf 'CHANGED: no line matches "%s" in\n%s\n' "$2" "$1" >&2; exit 1; }
}

# refuse TEXT PATTERN: the text must have no such line.
refuse() {
  ! grep -Eq -- "$2" <<< "$1" || { printf 'CHANGED: a line matches "%s" in\n%s\n' "$2" "$1" >&2; exit 1; }
}
