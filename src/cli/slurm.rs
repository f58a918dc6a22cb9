//! `tiesmith slurm`: a script that submits a planned merge as two arrays and the end of it.

use std::path::Path;

use tiesmith::{Error, Result, printable};

use super::args::SlurmArgs;
use super::{job, print};

/// What a job is given beyond `--memory`, for what is not the process's own.
const SPARE_MEBIBYTES: u64 = 256;

/// Runs the command.
pub fn run(args: &SlurmArgs) -> Result<u8> {
    let job::Saved { job: planned, memory, threads } = job::saved(&args.job)?;
    let memory = args.resources.memory.unwrap_or(memory);
    let threads = args.resources.threads.or(threads).unwrap_or(4);
    let file = std::path::absolute(&args.job)
        .map_err(|e| Error::usage(format!("{}: {e}", args.job.display())).help("give the plan file by its path"))?;
    let out = planned.address().unwrap_or(&planned.out);
    let script = Script { file: &file, out, parts: args.parts, memory, threads, sbatch: &args.sbatch };
    print(&script.text())
}

struct Script<'a> {
    file: &'a Path,
    out: &'a Path,
    parts: usize,
    memory: u64,
    threads: usize,
    sbatch: &'a [String],
}

impl Script<'_> {
    fn text(&self) -> String {
        let Self { parts, memory, threads, .. } = self;
        // A line of a comment, so that nothing in the name can be anything else.
        let (file, shown) = (quoted(&self.file.to_string_lossy()), printable(&self.out.to_string_lossy()));
        let mebibytes = memory.div_ceil(1 << 20) + SPARE_MEBIBYTES;
        let options: String = self.sbatch.iter().map(|option| format!(" {}", quoted(option))).collect();
        format!(
            r#"#!/bin/bash
# Submits a merge in {parts} parts: sketch, then merge, then finish. Each waits until the one before it has succeeded.
# Preempted and requeued tasks go on where they were. To do failed tasks again, run this script again: what is done is
# not done twice.
# Output: {shown}
set -euo pipefail
export TIESMITH="${{TIESMITH:-tiesmith}}" JOB={file}
submit() {{ sbatch --parsable --requeue --open-mode=append --kill-on-invalid-dep=yes{options} "$@"; }}
task=(--array=1-{parts} --cpus-per-task={threads} --mem={mebibytes}M)
part="--part \$SLURM_ARRAY_TASK_ID/{parts} --threads {threads} --memory {memory}B"

sketch=$(submit --job-name=tiesmith-sketch "${{task[@]}}" \
  --wrap "exec \"\$TIESMITH\" run \"\$JOB\" --stage sketch $part")
merge=$(submit --job-name=tiesmith-merge --dependency=afterok:"$sketch" "${{task[@]}}" \
  --wrap "exec \"\$TIESMITH\" run \"\$JOB\" --stage merge $part")
finish=$(submit --job-name=tiesmith-finish --dependency=afterok:"$merge" --cpus-per-task=1 --mem={mebibytes}M \
  --wrap "exec \"\$TIESMITH\" finish \"\$JOB\"")
echo "sketch $sketch, merge $merge, finish $finish"
"#
        )
    }
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_the_shell() {
        assert_eq!(quoted("/a/b-1.plan"), "/a/b-1.plan");
        assert_eq!(quoted("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn arrays_depend_on_each_other() {
        let options = ["--partition=cpu".to_owned(), "--comment=a b".to_owned()];
        let (file, out) = (Path::new("/x/job.plan"), Path::new("/x/out"));
        let script = Script { file, out, parts: 6, memory: 1 << 30, threads: 3, sbatch: &options };
        let text = script.text();
        for line in [
            "JOB=/x/job.plan",
            "--array=1-6 --cpus-per-task=3 --mem=1280M",
            "--partition=cpu '--comment=a b'",
            "--part \\$SLURM_ARRAY_TASK_ID/6 --threads 3 --memory 1073741824B",
            "--dependency=afterok:\"$sketch\"",
            "--dependency=afterok:\"$merge\"",
            r#"--wrap "exec \"\$TIESMITH\" run \"\$JOB\" --stage sketch $part")"#,
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
