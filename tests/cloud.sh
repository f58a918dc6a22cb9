#!/bin/bash
# Merges of inputs in an S3-compatible store on this host: the bytes of local inputs, or one clear error. Finished shards
# are uploaded by a command, which is killed with the merge in between, and by the merge itself, killed too.
#
#   tests/cloud.sh [TIESMITH]
#
# Needs a build with --features cloud, and Python's moto, which is installed into a temporary directory if it can be; says so
# and ends with 77 without them. Azure's part needs npm, and says so where it is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
TIESMITH=$(realpath "${1:-target/release/tiesmith}")
skip() { echo "skipped: $1"; exit 77; }
fail() { echo "failed: $1"; exit 1; }
command -v python3 > /dev/null || skip "no python3"
[ -x "$TIESMITH" ] || skip "no $TIESMITH (cargo build --release --features cloud)"
work=$(mktemp -d "${TMPDIR:-/tmp}/tiesmith-cloud.XXXXXX")
server= azurite=
stop() {
  [ -z "$server" ] || kill "$server" 2> /dev/null || true
  [ -z "$azurite" ] || kill "$azurite" 2> /dev/null || true
  rm -rf "$work"
}
trap stop EXIT
python=${MOTO_PYTHON:-python3}
if ! "$python" -c 'import moto.server, boto3' 2> /dev/null; then
  timeout 30 python3 -m venv "$work/venv" > /dev/null 2>&1 \
    && timeout 180 "$work/venv/bin/pip" install --quiet --timeout 10 --retries 1 'moto[s3,server]>=5' boto3 > /dev/null 2>&1 \
    || skip "no moto, and it cannot be installed (pip install 'moto[s3,server]' boto3)"
  python=$work/venv/bin/python
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cat > "$work/server.py" <<'PY'
import sys
from moto.moto_server import werkzeug_app
from moto.server import main
call = werkzeug_app.DomainDispatcherApplication.__call__
told = []
# Google's client sends an empty token where there is no sign-in, which is no signature of Amazon's.
def with_a_key(self, environ, start_response):
    if environ.get("HTTP_AUTHORIZATION", "").strip() in ("", "Bearer"):
        environ["HTTP_AUTHORIZATION"] = "AWS key:signature"
    if environ.get("PATH_INFO", "").startswith("/skewed"):
        start_response("403 Forbidden", [("Content-Type", "application/xml")])
        return [b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message></Error>"]
    if environ.get("PATH_INFO", "").startswith("/busy") and not told:
        told.append(True)
        start_response("503 Slow Down", [("Retry-After", "1")])
        return [b""]
    if environ.get("PATH_INFO", "").startswith("/noranges/"):
        environ.pop("HTTP_RANGE", None)
    return call(self, environ, start_response)
werkzeug_app.DomainDispatcherApplication.__call__ = with_a_key
main(sys.argv[1:])
PY
"$python" "$work/server.py" -H 127.0.0.1 -p "$port" > "$work/server.log" 2>&1 &
server=$!
export AWS_ENDPOINT_URL=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret AWS_DEFAULT_REGION=us-east-1
export AWS_REGION=us-east-1 HF_HUB_OFFLINE=1
for _ in $(seq 100); do
  (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break
  sleep 0.2
done

# A family in two shards each, and a tool for the store.
cat > "$work/s3.py" <<'PY'
import os, sys, boto3
s3 = boto3.client("s3")
verb, *args = sys.argv[1:]
if verb == "up":
    bucket, root = args
    s3.create_bucket(Bucket=bucket)
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            s3.upload_file(path, bucket, os.path.relpath(path, root))
elif verb == "put":
    bucket, key, path = args
    s3.upload_file(path, bucket, key)
elif verb == "names":
    bucket, prefix = args
    print(*(entry["Key"] for entry in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])))
elif verb == "down":
    bucket, prefix, root = args
    os.makedirs(root, exist_ok=True)
    for entry in s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        s3.download_file(bucket, entry["Key"], os.path.join(root, os.path.basename(entry["Key"])))
PY
python3 - "$work/in" <<'PY'
import json, os, random, struct, sys
random.seed(2)
shapes = [("a", 900_000), ("b", 70_001), ("c", 500_000), ("d", 3)]
base = [bytearray(random.randbytes(n * 2)) for _, n in shapes]
for data in base:
    data[1::2] = bytes(0x3C | (b & 0x80) for b in data[1::2])
def write(name, tensors):
    os.makedirs(f"{sys.argv[1]}/{name}")
    where = {}
    for part, indexes in (("1", (0, 1)), ("2", (2, 3))):
        header, at = {}, 0
        for i in indexes:
            header[shapes[i][0]] = {"dtype": "BF16", "shape": [shapes[i][1]], "data_offsets": [at, at + len(tensors[i])]}
            at += len(tensors[i])
            where[shapes[i][0]] = f"model-0000{part}-of-00002.safetensors"
        text = json.dumps(header).encode()
        with open(f"{sys.argv[1]}/{name}/model-0000{part}-of-00002.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + b"".join(bytes(tensors[i]) for i in indexes))
    with open(f"{sys.argv[1]}/{name}/model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": where}, file)
    with open(f"{sys.argv[1]}/{name}/config.json", "w") as file:
        json.dump({"torch_dtype": "bfloat16"}, file)
write("base", base)
for name in ("x", "y"):
    model = [bytearray(data) for data in base]
    for data in model:
        low = random.randbytes(len(data) // 2)
        data[0::2] = bytes((a + (b % 9 if b % 3 == 0 else 0)) & 0xFF for a, b in zip(data[0::2], low))
    write(name, model)
PY
"$python" "$work/s3.py" up models "$work/in"

merge() { # OUT FROM FLAGS...
  local out=$1 from=$2
  shift 2
  "$TIESMITH" merge --base "$from/base" --model "$from/x" --model "$from/y" --out "$out" --progress none --max-shard-size 1MB "$@"
}
same() { # DIR DIR
  for file in "$1"/*.safetensors "$1"/*.index.json; do
    cmp "$file" "$2/$(basename "$file")" || fail "$file differs"
  done
}
count=0
passed() { count=$((count + 1)); echo "ok: $1"; }
for flags in "--scope=model --memory=44MB" "--scope=tensor" "--scope=model --threads=3"; do
  rm -rf "$work/local" "$work/remote"
  # shellcheck disable=SC2086
  merge "$work/local" "$work/in" $flags > /dev/null
  # shellcheck disable=SC2086
  merge "$work/remote" s3://models $flags > /dev/null
  same "$work/local" "$work/remote"
  passed "s3 inputs give the bytes of local ones ($flags)"
done
"$TIESMITH" diff "$work/in/x" s3://models/x > /dev/null || fail "diff"
"$TIESMITH" inspect s3://models/x/model-00001-of-00002.safetensors > /dev/null 2>&1 || fail "a file by its address"
passed "diff and inspect"

refused() { # CODE WORDS COMMAND...
  local code=0 expected=$1 words=$2
  shift 2
  "$@" > /dev/null 2> "$work/error" || code=$?
  [ "$code" = "$expected" ] || fail "exit $code, not $expected: $* $(cat "$work/error")"
  grep -v '^warning: ' "$work/error" > "$work/line" || true
  [ "$(wc -l < "$work/line")" = 1 ] || fail "not one line: $(cat "$work/error")"
  grep -q "$words" "$work/line" || fail "no '$words' in: $(cat "$work/line")"
  passed "$(cat "$work/line")"
}
refused 2 "no such file" "$TIESMITH" inspect s3://models/nothing
refused 2 "no such object\|no such file" "$TIESMITH" inspect s3://models/x/model-00009-of-00002.safetensors
refused 1 "run the same command again\|access is denied\|no such" env AWS_ENDPOINT_URL=http://127.0.0.1:9 "$TIESMITH" inspect s3://models/x
refused 2 "RequestTimeTooSkewed.*set this machine's clock" "$TIESMITH" inspect s3://skewed/x
"$python" "$work/s3.py" up noranges "$work/in"
refused 2 "ignores byte ranges" merge "$work/whole" s3://noranges
[ ! -e "$work/whole" ] || fail "something was made of what is refused"
"$TIESMITH" plan --method passthrough --model s3://busy/x > /dev/null 2> "$work/error" && fail "there is no such bucket"
grep -q "asks to wait 1.*s" "$work/error" || fail "no word of a wait: $(cat "$work/error")"
passed "a wait that the store asks for is told"
merge "$work/changed" s3://models --scope=model > /dev/null
"$TIESMITH" plan --base s3://models/base --model s3://models/x --model s3://models/y --out "$work/parts" --save "$work/job" > /dev/null
"$python" "$work/s3.py" put models x/model-00001-of-00002.safetensors "$work/in/y/model-00001-of-00002.safetensors"
refused 2 "is another" "$TIESMITH" run "$work/job" --part 1/1 --progress none
"$python" "$work/s3.py" put models x/model-00001-of-00002.safetensors "$work/in/x/model-00001-of-00002.safetensors"

# Every shard is uploaded and removed; the second time it is tried, the merge is killed with the third shard uploaded.
rm -rf "$work/local"
merge "$work/local" "$work/in" > /dev/null
upload="$python $work/s3.py put models merged/\$TIESMITH_SHARD_NAME {} && rm {}"
kill_once="if [ \$TIESMITH_SHARD_NUMBER = 2 ] && [ ! -e $work/killed ]; then touch $work/killed; kill -9 \$PPID; fi"
merge "$work/out" s3://models --on-shard "$upload && $kill_once" > /dev/null 2>&1 && fail "it was not killed"
sleep 1
merge "$work/out" s3://models --on-shard "$upload && $kill_once" > /dev/null
ls "$work"/out/*.safetensors > /dev/null 2>&1 && fail "shards stayed"
"$python" "$work/s3.py" put models merged/model.safetensors.index.json "$work/out/model.safetensors.index.json"
"$python" "$work/s3.py" down models merged/ "$work/back"
same "$work/local" "$work/back"
passed "shards uploaded one by one, with a kill in between"

# Uploaded without a command: by the merge itself, which is killed again and again. Files of more than 8 MiB go in parts.
python3 - "$work/in" <<'PY'
import json, os, random, struct, sys
random.seed(4)
n = 7_000_000
base = bytearray(random.randbytes(2 * n))
base[1::2] = bytes(0x3C | (b & 0x80) for b in base[1::2])
model = bytearray(base)
model[0::2] = bytes((a + 3) & 0xFF for a in model[0::2])
for name, data in (("bigbase", base), ("big", model)):
    os.makedirs(f"{sys.argv[1]}/{name}")
    text = json.dumps({"w": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}}).encode()
    with open(f"{sys.argv[1]}/{name}/model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + bytes(data))
    with open(f"{sys.argv[1]}/{name}/config.json", "w") as file:
        json.dump({"torch_dtype": "bfloat16"}, file)
PY
objects() { "$python" "$work/s3.py" names models "$1"; }
cd "$work"
for family in several one; do
  rm -rf "$work/local" "$work/back" "$work"/*.upload
  inputs=(--base "$work/in/base" --model "$work/in/x" --model "$work/in/y" --max-shard-size 1MB)
  [ $family = several ] || inputs=(--base "$work/in/bigbase" --model "$work/in/big")
  inputs+=(--progress none --lambda 0.9)
  again() { "$TIESMITH" merge "${inputs[@]}" --out "$@"; }
  again "$work/local" > /dev/null
  kills=0 done=
  for milliseconds in 15 30 45 60 75 90 105 120 140 160 180 210 250 300 360 450 600; do
    "$TIESMITH" merge "${inputs[@]}" --out "s3://models/up-$family" > /dev/null 2>&1 &
    pid=$!
    sleep "$(printf '0.%03d' $milliseconds)"
    kill -9 $pid 2> /dev/null || true
    code=0
    wait $pid 2> /dev/null || code=$?
    [ $code = 137 ] || { done=$code; break; }
    kills=$((kills + 1))
  done
  [ -n "$done" ] || { done=0; again "s3://models/up-$family" > /dev/null; }
  # A run that had uploaded everything, and was killed before it ended, is refused as done.
  [ "$done" = 0 ] || [ "$done" = 2 ] || fail "exit $done"
  [ "$kills" -gt 1 ] || fail "only $kills kills, then exit $done"
  [ ! -e "$work/up-$family.upload" ] || fail "the work directory stayed"
  "$python" "$work/s3.py" down models "up-$family/" "$work/back"
  for file in "$work"/local/*; do
    case $(basename "$file") in tiesmith.json | README.md) ;; *) cmp "$file" "$work/back/$(basename "$file")" ;; esac
  done
  [ -e "$work/back/tiesmith.json" ] && [ -e "$work/back/README.md" ] || fail "side files are missing"
  refused 2 "something is there already" again "s3://models/up-$family"
  passed "uploaded by the merge itself ($family), with $kills kills in between"
done
# In parts, which share a directory; what finishes them uploads, and is killed.
cd "$work"
rm -rf "$work/local" "$work/back"
merge "$work/local" "$work/in" > /dev/null
"$TIESMITH" plan --base s3://models/base --model s3://models/x --model s3://models/y --max-shard-size 1MB \
  --out s3://models/up-parts --save "$work/up.plan" > /dev/null
for part in 2/2 1/2; do "$TIESMITH" run up.plan --part $part --progress none > /dev/null; done
kills=0
for milliseconds in 20 40 60 80 100 120 150 200; do
  "$TIESMITH" finish up.plan > /dev/null 2>&1 &
  pid=$!
  sleep "$(printf '0.%03d' $milliseconds)"
  kill -9 $pid 2> /dev/null || true
  wait $pid 2> /dev/null || [ $? = 137 ] && kills=$((kills + 1))
done
"$TIESMITH" finish up.plan --progress none > /dev/null
"$TIESMITH" finish up.plan --progress none | grep -q "merged into *s3://models/up-parts" || fail "finished twice"
"$TIESMITH" run up.plan --part 1/2 --progress none | grep -q "was done before" || fail "run after the end"
[ ! -e up-parts.upload/.tiesmith/parts ] || fail "parts stayed"
"$python" "$work/s3.py" down models "up-parts/" "$work/back"
same "$work/local" "$work/back"
passed "made in parts and uploaded at the end, with $kills kills in between"
"$TIESMITH" plan --base "$work/in/base" --model "$work/in/x" --out s3://models/up-parts --work other --save other.plan > /dev/null
refused 2 "something is there already" "$TIESMITH" run other.plan --part 1/1 --progress none
[ ! -e other ] || fail "something was made of what is refused"
refused 2 "there is no such bucket" "$TIESMITH" plan --base "$work/in/base" --model "$work/in/x" --out s3://no-such-bucket/up --save other.plan
refused 2 "replaces nothing" again s3://models/up-one --force
refused 2 "there are none for --on-shard" again s3://models/up-three --on-shard true
refused 2 "there is no such bucket" again s3://no-such-bucket/up

# The other stores' clients: Azure's against its emulator, Google's against the same server, whose interface its XML API shares.
stores=()
if command -v npm > /dev/null && timeout 120 npm install --silent --prefix "$work/npm" azurite > /dev/null 2>&1; then
  azure=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "$work/npm/node_modules/.bin/azurite-blob" --silent --skipApiVersionCheck --inMemoryPersistence --blobPort "$azure" > "$work/azurite.log" 2>&1 &
  azurite=$!
  export AZURE_STORAGE_USE_EMULATOR=true AZURITE_BLOB_STORAGE_URL=http://127.0.0.1:$azure
  for _ in $(seq 100); do
    (exec 3<> "/dev/tcp/127.0.0.1/$azure") 2> /dev/null && break
    sleep 0.2
  done
  "$python" - "$azure" <<'PY'
import base64, datetime, hashlib, hmac, http.client, sys
# Makes a container, with the emulator's well-known key.
account, key = "devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n/{account}/{account}/models\nrestype:container"
sign = base64.b64encode(hmac.new(base64.b64decode(key), signed.encode(), hashlib.sha256).digest()).decode()
headers["Authorization"] = f"SharedKey {account}:{sign}"
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.request("PUT", f"/{account}/models?restype=container", headers=headers)
assert connection.getresponse().status == 201
PY
  stores+=(az://models)
else
  echo "skipped: Azure (azurite cannot be installed with npm)"
fi
export GOOGLE_BASE_URL=$AWS_ENDPOINT_URL
export GOOGLE_SERVICE_ACCOUNT_KEY='{"private_key": "key", "private_key_id": "id", "client_email": "somebody", "disable_oauth": true}'
stores+=(gs://models)
for store in "${stores[@]}"; do
  rm -rf "$work/local" "$work/remote" "$work"/*.upload
  merge "$work/local" "$work/in" > /dev/null
  for name in base x y; do
    "$TIESMITH" merge --method passthrough --model "$work/in/$name" --max-shard-size 1MB --progress none --out "$store/in/$name" > /dev/null
  done
  merge "$work/remote" "$store/in" > /dev/null
  same "$work/local" "$work/remote"
  merge "$store/out" "$store/in" > /dev/null
  "$TIESMITH" diff "$work/local" "$store/out" > /dev/null || fail "$store: another model was uploaded"
  "$TIESMITH" merge --method passthrough --model "$work/in/big" --progress none --out "$store/big" > /dev/null
  "$TIESMITH" diff "$work/in/big" "$store/big" > /dev/null || fail "$store: another file was uploaded in parts"
  refused 2 "something is there already" merge "$store/out" "$work/in"
  refused 2 "no such file" "$TIESMITH" inspect "$store/nothing"
  passed "$store: merged from there and to there"
done
echo "$count passed, 0 failed"
