#!/usr/bin/env bash
# Installs the system libraries that no wheel carries, where they are missing: OpenGL in software for
# MuJoCo's pictures, and FFmpeg for torchcodec. Prints what to do where it may not install.
set -euo pipefail

missing=()
have() { ldconfig -p 2>/dev/null | grep -q "$1"; }
have libOSMesa.so || missing+=(libosmesa6)
have libEGL.so || missing+=(libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2)
have libavcodec.so || missing+=(ffmpeg)
[ ${#missing[@]} -eq 0 ] && exit 0

apt=(apt-get)
if [ "$(id -u)" -ne 0 ]; then
    if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        apt=(sudo -n apt-get)
    else
        apt=()
    fi
fi
if [ ${#apt[@]} -eq 0 ] || ! command -v apt-get >/dev/null; then
    echo "These system packages are missing and this user may not install them: ${missing[*]}" >&2
    echo "On Debian or Ubuntu: sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
"${apt[@]}" update -qq
"${apt[@]}" install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
