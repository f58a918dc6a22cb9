#!/bin/bash
# Kernels and selection on an emulated aarch64, against their oracles; and merges of the bundled sample there, whose files
# must be those of this machine.
#
#   tests/aarch64.sh
#
# Needs the Rust target aarch64-unknown-linux-gnu, aarch64-linux-gnu-gcc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu,
# libc6-dev-arm64-cross, qemu-user); says so and ends with 77 without them.
set -euo pipefail
cd "$(dirname "$0")/.."
skip() { echo "skipped: $1"; exit 77; }
target=aarch64-unknown-linux-gnu
command -v aarch64-linux-gnu-gcc > /dev/null || skip "no aarch64-linux-gnu-gcc"
command -v qemu-aarch64 > /dev/null || skip "no qemu-aarch64"
[ -d "$(rustc --print sysroot)/lib/rustlib/$target" ] || skip "no Rust target $target (rustup target add $target)"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
built=${CARGO_TARGET_DIR:-target}

cargo test --locked --target $target --lib -- kernels sketch
cargo build --locked --target $target --bin tiesmith
cargo build --locked --bin tiesmith

work=$(mktemp -d "${TMPDIR:-/tmp}/tiesmith-aarch64.XXXXXX")
trap 'rm -rf "$work"' EXIT
here=("$built/debug/tiesmith")
there=(qemu-aarch64 -L /usr/aarch64-linux-gnu "$built/$target/debug/tiesmith")
models=()
for model in examples/digits/*/; do [ "$model" = examples/digits/base/ ] || models+=(--model "$model"); done
for options in "ties" "ties --scope tensor --dtype bfloat16" "ties --trim-ties sample --dtype float16" "linear" \
  "task_arithmetic --lambda 0.3" "dare_ties" "della" "breadcrumbs" "model_stock" "sce" "karcher"; do
  for machine in here there; do
    declare -n command=$machine
    "${command[@]}" merge --base examples/digits/base "${models[@]}" --method $options --out "$work/$machine" --progress none > /dev/null
  done
  for file in "$work"/here/*.safetensors; do cmp "$file" "$work/there/${file##*/}"; done
  echo "the same bytes: $options"
  rm -rf "$work/here" "$work/there"
done
