#!/bin/bash
# The Hub-like server of the tests against Python's huggingface_hub: that what the tests prove is proved about the Hub.
#
#   tests/hub.sh
#
# Needs cargo, and huggingface_hub, which is installed into a temporary directory if it can be; says so and ends with 77
# without it.
set -euo pipefail
cd "$(dirname "$0")/.."
skip() { echo "skipped: $1"; exit 77; }
command -v python3 > /dev/null || skip "no python3"
work=$(mktemp -d "${TMPDIR:-/tmp}/tiesmith-hub.XXXXXX")
server=
stop() { [ -z "$server" ] || kill "$server" 2> /dev/null || true; rm -rf "$work"; }
trap stop EXIT
python=${HUB_PYTHON:-python3}
if ! "$python" -c 'import huggingface_hub' 2> /dev/null; then
  timeout 20 python3 -m venv "$work/venv" > /dev/null 2>&1 \
    && timeout 50 "$work/venv/bin/pip" install --quiet --timeout 10 --retries 1 huggingface_hub > /dev/null 2>&1 \
    || skip "no huggingface_hub, and it cannot be installed"
  python=$work/venv/bin/python
fi
binary=${HUB_TESTS:-$(cargo test --locked --test it --no-run --message-format=short 2>&1 | sed -n 's/.*Executable.*(\(.*\)).*/\1/p')}
TIESMITH_HUB=$work/endpoint "$binary" --ignored --exact remote::serve > "$work/log" 2>&1 &
server=$!
for _ in $(seq 300); do [ -s "$work/endpoint" ] && break; sleep 0.1; done
[ -s "$work/endpoint" ] || { echo "failed: the server does not start: $(tail -n 3 "$work/log")"; exit 1; }
HF_ENDPOINT=$(cat "$work/endpoint") HF_HOME=$work/home HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1 \
  HF_HUB_DISABLE_PROGRESS_BARS=1 "$python" - <<'PY'
import os
import huggingface_hub
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

api = HfApi()
info = api.model_info("org/base", revision="v1")
assert len(info.sha) == 40, info
names = {sibling.rfilename for sibling in info.siblings}
folder = snapshot_download("org/base")
assert set(os.listdir(folder)) == names and os.path.basename(folder) == info.sha
path = hf_hub_download("org/model1", "model.safetensors")
metadata = get_hf_file_metadata(hf_hub_url("org/model1", "model.safetensors"))
assert metadata.commit_hash == info.sha and metadata.size == os.path.getsize(path) and metadata.etag, metadata
assert api.get_safetensors_metadata("org/base").sharded, "ranges of headers"


def raises(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return
    raise AssertionError(f"no {error}")


raises(RepositoryNotFoundError, api.model_info, "org/nothing")
raises(RevisionNotFoundError, api.model_info, "org/base", revision="v9")
raises(EntryNotFoundError, hf_hub_download, "org/base", "nothing.bin")
raises(GatedRepoError, api.model_info, "org/gated", token="hf_other")
assert api.model_info("org/gated", token="hf_secret").sha == info.sha
print(f"huggingface_hub {huggingface_hub.__version__} takes the server for the Hub")
PY
