#!/bin/bash
# One merge on a real Slurm, all of it on this host: a controller and two node daemons. An array of 6 parts sketches, one
# of 6 merges, one task is killed and requeued, and the output is compared with that of a merge in one piece.
#
#   tests/slurm.sh [TIESMITH [MEGABYTES]]
#
# Needs root, and Debian's slurm-wlm and munge (apt-get install slurm-wlm munge); says so and ends with 77 without them.
# Everything it makes is in one temporary directory, which goes away with it, but for munge's own key.
set -euo pipefail
cd "$(dirname "$0")/.."
export TIESMITH=$(realpath "${1:-target/release/tiesmith}") MEGABYTES=${2:-1000}
skip() { echo "skipped: $1"; exit 77; }
[ "$(id -u)" = 0 ] || skip "not root"
for program in slurmctld slurmd sbatch munged python3; do
  command -v "$program" > /dev/null || skip "no $program (apt-get install slurm-wlm munge python3)"
done
[ -x "$TIESMITH" ] || skip "no $TIESMITH (cargo build --release)"

work=$(mktemp -d "${TMPDIR:-/tmp}/tiesmith-slurm.XXXXXX")
export SLURM_CONF=$work/slurm.conf
munged_was_there=yes; munge -n > /dev/null 2>&1 || munged_was_there=
stop() {
  timeout 10 scancel --user=root > /dev/null 2>&1 || true
  timeout 10 scontrol shutdown > /dev/null 2>&1 || true
  # Those that do not end by themselves.
  for pidfile in "$work"/slurm*.pid; do
    [ -s "$pidfile" ] || continue
    pid=$(cat "$pidfile")
    for _ in $(seq 50); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2> /dev/null || true
  done
  [ -n "$munged_was_there" ] || { [ ! -f /run/munge/munged.pid ] || kill "$(cat /run/munge/munged.pid)" 2> /dev/null || true; }
  rm -rf "$work"
}
trap stop EXIT

# A family of a base and three fine-tunes, in bfloat16.
python3 - "$work" "$MEGABYTES" <<'PY'
import json, os, random, struct, sys
work, megabytes = sys.argv[1], int(sys.argv[2])
tensors, rows = 24, megabytes * 1_000_000 // 4 // 24 // 2
random.seed(1)
block = bytearray(random.randbytes(1 << 20))
for name, shift in (("base", 0), ("a", 1), ("b", 2), ("c", 3)):
    os.makedirs(f"{work}/{name}")
    header = {f"layers.{i}.weight": {"dtype": "BF16", "shape": [rows], "data_offsets": [i * rows * 2, (i + 1) * rows * 2]} for i in range(tensors)}
    text = json.dumps(header).encode()
    # Finite values near 0.02 with random signs, and low bits that differ between the models.
    data = bytearray(len(block))
    data[1::2] = bytes(0x3C | (b & 0x80) for b in block[1::2])
    data[0::2] = bytes((b + shift * (b % 7 if b % 5 == shift else 0)) & 0xFF for b in block[0::2])
    total = rows * 2 * tensors
    with open(f"{work}/{name}/model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while total > 0:
            file.write(data[: min(total, len(data))])
            total -= len(data)
PY

[ -n "$munged_was_there" ] || {
  mkdir -p /run/munge && chown munge: /run/munge
  [ -f /etc/munge/munge.key ] || /usr/sbin/mungekey --create || skip "no key for munge"
  runuser -u munge -- munged || skip "munged does not start"
}
mkdir -p "$work/state" "$work/spool1" "$work/spool2"
host=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=tiesmith
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=2 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES State=UP
CONF
mkdir -p "$work/spooln1" "$work/spooln2"
slurmctld || skip "slurmctld does not start: $(tail -n 1 "$work/slurmctld.log" 2> /dev/null)"
for node in n1 n2; do
  slurmd -N $node || skip "slurmd does not start: $(tail -n 1 "$work/slurmd$node.log" 2> /dev/null)"
done
for _ in $(seq 60); do
  [ "$(sinfo -h -o %T -t idle | wc -l)" -gt 0 ] && [ "$(sinfo -h -N -t idle | wc -l)" = 2 ] && break
  sleep 0.5
done
[ "$(sinfo -h -N -t idle | wc -l)" = 2 ] || skip "the nodes do not come up here: $(sinfo -h -N -o '%N %T %E' | tr '\n' ' ')"

cd "$work"
inputs=(--base base --model a --model b --model c --trim-ties lowest --max-shard-size "$((MEGABYTES / 40 + 1))MB")
"$TIESMITH" merge "${inputs[@]}" --out whole --progress none
"$TIESMITH" plan "${inputs[@]}" --out merged --save job.plan --memory 300MB --threads 1 > /dev/null
"$TIESMITH" slurm job.plan --parts 6 -- --output="$work/task-%A-%a.log" > submit.sh
line=$(bash submit.sh)
echo "submitted: $line"
sketch=$(sed 's/sketch \([0-9]*\).*/\1/' <<< "$line")
finish=$(sed 's/.*finish \([0-9]*\)/\1/' <<< "$line")
# One task is killed and requeued as soon as it runs. Slurm lets it wait for two minutes; this does not.
for _ in $(seq 100); do [ "$(squeue -h -j "${sketch}_1" -o %T 2> /dev/null)" = RUNNING ] && break; sleep 0.1; done
if scontrol requeue "${sketch}_1"; then
  sleep 3
  scontrol update jobid="${sketch}_1" starttime=now 2> /dev/null || true
  echo "requeued: ${sketch}_1"
else
  echo "requeued: nothing, ${sketch}_1 was done before"
fi
for _ in $(seq 600); do
  [ -z "$(squeue -h -j "$finish" 2> /dev/null)" ] && break
  sleep 0.5
done
if [ ! -f merged/tiesmith.json ]; then
  echo "the output is not there:"; squeue || true; tail -n 3 "$work"/task-*.log; exit 1
fi
for file in whole/*.safetensors whole/*.json; do
  name=$(basename "$file")
  [ "$name" = tiesmith.json ] || cmp "$file" "merged/$name"
done
"$TIESMITH" verify merged
echo "nodes: $(grep -l "Launching batch job" slurmd*.log | wc -l) of 2 ran tasks"
echo "bytes equal to those of a merge in one piece: $(ls merged/*.safetensors | wc -l) shards"
