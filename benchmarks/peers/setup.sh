#!/usr/bin/env bash
# Sets up the peers that are not Python packages of this project: OpenVINO GenAI, and llama-server built from source.
# Everything comes from the Python registry, with pinned versions. What is there already is skipped; run it again at will.
#
#     benchmarks/peers/setup.sh [FOLDER]      default: benchmarks/peers/.venvs
#
# FOLDER/convert    venv with torch: converts the model for both peers
# FOLDER/openvino   venv with openvino-genai alone, in which it is measured
# FOLDER/llama_cpp  source and build of llama-server
set -euo pipefail
cd "$(dirname "$0")"
FOLDER=${1:-.venvs}
PYTHON=${PYTHON:-python3}
OPENVINO=2026.4.1
OPTIMUM_INTEL=2.2.0
TORCH=2.13.0
LLAMA_CPP_PYTHON=0.3.36
GGUF=0.19.0
SENTENCEPIECE=0.2.3
CMAKE=4.4.4
NINJA=1.13.2
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)

make_venv() { # name, packages...
    local venv=$FOLDER/$1
    shift
    [ -e "$venv/.installed" ] && { echo "$venv: there"; return; }
    "$PYTHON" -m venv "$venv"
    "$venv/bin/pip" install --quiet --upgrade pip
    "$venv/bin/pip" install --quiet "$@"
    touch "$venv/.installed"
    echo "$venv: installed"
}

make_venv openvino "openvino-genai==$OPENVINO.0" "openvino==$OPENVINO"
# ninja and cmake build llama.cpp below; gguf and sentencepiece are for its conversion script.
make_venv convert "torch==$TORCH" "optimum-intel==$OPTIMUM_INTEL" "openvino==$OPENVINO" "openvino-tokenizers==$OPENVINO.0" \
    "gguf==$GGUF" "sentencepiece==$SENTENCEPIECE" "cmake==$CMAKE" "ninja==$NINJA"
# It comes with optimum-intel, does not fit this torch, and breaks the import of transformers.
"$FOLDER/convert/bin/pip" uninstall --quiet --yes torchvision 2>/dev/null || true

SOURCE=$FOLDER/llama_cpp
BIN=$FOLDER/convert/bin
if [ ! -e "$SOURCE/.unpacked" ]; then
    rm -rf "$SOURCE" && mkdir -p "$SOURCE"
    "$BIN/pip" download --quiet --no-deps --no-binary llama-cpp-python --dest "$SOURCE" "llama-cpp-python==$LLAMA_CPP_PYTHON"
    tar -xzf "$SOURCE"/llama_cpp_python-*.tar.gz -C "$SOURCE" --strip-components=1
    touch "$SOURCE/.unpacked"
fi
if [ ! -e "$SOURCE/.built" ]; then # ninja goes on where an interrupted build stopped
    PATH=$BIN:$PATH nice -n 10 cmake -S "$SOURCE/vendor/llama.cpp" -B "$SOURCE/build" -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON \
        -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF
    PATH=$BIN:$PATH nice -n 10 cmake --build "$SOURCE/build" --target llama-server llama-quantize -j 2
    touch "$SOURCE/.built"
fi
echo "$SOURCE: built"
