#!/bin/sh
# Make the virtual environment in which LeRobot 0.4.4 runs as a peer: sh jobs/bench/lerobot_venv.sh [DIR] [PYTHON]
#
# LeRobot asks for versions of torch and torchvision that robolake does not want, so it never shares our
# environment: it goes in without its dependencies, then come only those that its dataset code imports.
# Of torchvision, in the range that LeRobot asks for, only the Python part is used: that fits any torch.
# Running this again is free: a stamp holds the checksum of this recipe.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-$root/.venv-lerobot}
python=${2:-python3}
stamp=$venv/robolake-recipe
recipe=$(cksum <"$0")

if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$recipe" ]; then
    exit 0
fi
if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
    echo "$venv is there already and is no virtual environment; give another directory" >&2
    exit 1
fi
say() { echo "lerobot: $*" >&2; }

say "making $venv, which takes some minutes"
rm -rf "$venv"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@" >&2; }
say "1 of 2: lerobot and torchvision"
pip --no-deps lerobot==0.4.4 torchvision==0.25.0
say "2 of 2: torch and what LeRobot's dataset code imports; pip will miss the rest"
pip torch==2.13.0 torchcodec==0.13.0 \
    "accelerate<2" "av>=15,<16" "datasets>=4,<5" "deepdiff<9" draccus==0.10.0 "einops<0.9" "gymnasium>=1.1.1,<2" \
    "huggingface-hub>=0.34.2,<0.36" "imageio[ffmpeg]" jsonlines "opencv-python-headless<4.13" "packaging<26" pillow \
    pyserial "setuptools<81" termcolor
printf '%s\n' "$recipe" >"$stamp"
say "made $venv"
