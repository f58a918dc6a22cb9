//! Shards handed over to a command of the user's, which may upload them and remove them, or uploaded to an object store: so
//! that an output need not fit on the disk.
//!
//! - The command runs when a shard is durable under its final name, and before the output becomes loadable. One runs at a
//!   time, while the merge goes on.
//! - That it succeeded is recorded with the shard's hash and checksums: the shard need not be there any more. If the process ends
//!   between the command's success and the record, it runs again; if it had removed the shard, that is made again first.
//! - A command that fails ends the run; the same run goes on with it.
//! - A run that is to stop asks the command to end, and does not wait for it for long.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use serde::{Deserialize, Serialize};

use super::Observer;
use super::output::OutputDir;
use super::pool::no_thread;
use super::shards::{SealedShard, Written};
use super::tensor_crc::{self, Crc};
use crate::error::{Error, Result, printable};
use crate::plan::Plan;

/// What of a command's complaint is kept for the message.
const COMPLAINT_BYTES: usize = 4096;
/// How long a command has to end when the run is to stop.
const GRACE: Duration = Duration::from_millis(1000);
/// Between looks whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What becomes of finished shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnShard {
    /// The shell runs this command for each, and it may remove it.
    Command(String),
    /// Each is uploaded to this address in an object store and removed, and so is in the end everything else in the output
    /// directory, and the directory.
    Upload(String),
}

/// A shard that has been handed over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HandedOver {
    /// Its name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of the file, in hexadecimal.
    pub blake3: String,
    /// Checksums of its tensors' bytes, in hexadecimal, in the order of the plan.
    pub tensors: Vec<String>,
    /// The address that it was uploaded to, if it was not a command that had it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

impl HandedOver {
    /// Shard `shard` of `plan`, sealed as `sealed`, with its tensors' checksums.
    pub(super) fn new(plan: &Plan, shard: usize, sealed: &SealedShard, crc: impl Fn(u32) -> Crc) -> Self {
        let tensors = tensors_of(plan, shard).map(|tensor| tensor_crc::hex(crc(tensor)));
        Self {
            name: plan.layout.shards[shard].name.clone(),
            bytes: sealed.bytes,
            blake3: sealed.hash.clone(),
            tensors: tensors.collect(),
            to: None,
        }
    }

    /// The same, once all shards are written.
    pub(super) fn of_written(plan: &Plan, shard: usize, written: &Written) -> Self {
        Self::new(plan, shard, &written.shards[shard], |tensor| written.tensors[tensor as usize])
    }

    /// What sealing it found out, and its tensors' checksums; `None` if it is no shard `shard` of `plan`.
    pub(super) fn of(&self, plan: &Plan, shard: usize) -> Option<(SealedShard, Vec<(u32, Crc)>)> {
        let planned = &plan.layout.shards[shard];
        let crcs: Vec<(u32, Crc)> = tensors_of(plan, shard)
            .zip(&self.tensors)
            .map(|(tensor, crc)| Some((tensor, Crc::from_str_radix(crc, 16).ok()?)))
            .collect::<Option<_>>()?;
        let fits = planned.name == self.name
            && planned.bytes == self.bytes
            && tensors_of(plan, shard).count() == self.tensors.len();
        fits.then(|| (SealedShard { hash: self.blake3.clone(), bytes: self.bytes }, crcs))
    }
}

fn tensors_of(plan: &Plan, shard: usize) -> impl Iterator<Item = u32> + '_ {
    let places = plan.layout.tensors.iter().zip(0..);
    places.filter(move |(place, _)| place.shard as usize == shard).map(|(_, tensor)| tensor)
}

/// What has been handed over, by name.
pub(super) type AllHandedOver = HashMap<String, HandedOver>;

/// Hands `shard` over, unless that is done, and records it. Does nothing if nobody wants it.
pub(super) fn hand_over(
    output: &OutputDir,
    shard: &HandedOver,
    (index, count): (usize, usize),
    observer: &dyn Observer,
) -> Result<()> {
    let Some(on_shard) = &output.on_shard else { return Ok(()) };
    if output.was_handed_over(&shard.name) {
        return Ok(());
    }
    observer.go_on()?;
    match on_shard {
        OnShard::Command(command) => {
            run_command(command, output, shard, (index, count), observer)?;
            output.record_handed_over(shard)
        }
        OnShard::Upload(address) => {
            output.upload(&shard.name, observer)?;
            output.record_handed_over(&HandedOver { to: Some(address.clone()), ..shard.clone() })?;
            output.storage.remove_file(&output.dir.join(&shard.name))
        }
    }
}

/// Runs `command` for `shard`; an error says what it complained of.
fn run_command(
    command: &str,
    output: &OutputDir,
    shard: &HandedOver,
    (index, count): (usize, usize),
    observer: &dyn Observer,
) -> Result<()> {
    let path = std::path::absolute(output.dir.join(&shard.name)).unwrap_or_else(|_| output.dir.join(&shard.name));
    let mut child = shell(command, &path)
        .env("TIESMITH_SHARD", &path)
        .env("TIESMITH_SHARD_NAME", &shard.name)
        .env("TIESMITH_SHARD_NUMBER", (index + 1).to_string())
        .env("TIESMITH_SHARD_COUNT", count.to_string())
        .env("TIESMITH_SHARD_BYTES", shard.bytes.to_string())
        .env("TIESMITH_SHARD_BLAKE3", &shard.blake3)
        .env("TIESMITH_OUT", std::path::absolute(&output.dir).unwrap_or_else(|_| output.dir.clone()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&path, &format!("cannot run the command of --on-shard: {e}")))?;
    let complaint = complaint_of(&mut child)?;
    let status = wait_for(&mut child, observer)
        .map_err(|e| failed(&path, &format!("the command of --on-shard got lost: {e}")))?;
    let Some(status) = status else {
        observer.go_on()?;
        return Err(failed(&path, "the command of --on-shard was ended"));
    };
    if !status.success() {
        // An interrupt from the keyboard reaches the command too.
        observer.go_on()?;
        let complaint = complaint.recv_timeout(GRACE).unwrap_or_default();
        let said = if complaint.is_empty() { String::new() } else { format!(": {}", printable(&complaint)) };
        return Err(failed(&path, &format!("the command of --on-shard failed ({status}){said}")));
    }
    Ok(())
}

fn failed(path: &Path, what: &str) -> Error {
    Error::failed(what).at(path).help("mend what is wrong and run the same command again: it goes on with this shard")
}

/// Waits for the command to end; `None` if the run is to stop and the command did not end of its own accord.
fn wait_for(child: &mut Child, observer: &dyn Observer) -> std::io::Result<Option<ExitStatus>> {
    let mut stopping: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        match stopping {
            None if observer.stopped() => {
                terminate(child);
                stopping = Some(Instant::now());
            }
            Some(since) if since.elapsed() >= GRACE => {
                child.kill()?;
                return Ok(None);
            }
            _ => {}
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Asks the command to end.
#[cfg(unix)]
fn terminate(child: &Child) {
    use rustix::process::{Pid, Signal, kill_process};

    if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended just now.
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// Where there is no way to ask, it has until it is ended.
#[cfg(not(unix))]
fn terminate(_: &Child) {}

/// The last line that the command writes to its standard error, which is read to the end by a thread: whoever the command
/// started may hold it open for longer.
fn complaint_of(child: &mut Child) -> Result<Receiver<String>> {
    let stderr = child.stderr.take();
    let (sender, receiver) = crossbeam_channel::bounded(1);
    let listen = move || {
        let mut tail = Vec::new();
        if let Some(mut stderr) = stderr {
            let mut buffer = [0; COMPLAINT_BYTES];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                tail.extend_from_slice(&buffer[..count]);
                tail.drain(..tail.len().saturating_sub(COMPLAINT_BYTES));
            }
        }
        let text = String::from_utf8_lossy(&tail);
        let last = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        // Nobody may want to know.
        let _ = sender.send(last.to_owned());
    };
    match std::thread::Builder::new().name("complaint".into()).spawn(listen) {
        Ok(_) => Ok(receiver),
        Err(error) => {
            let _ = child.kill();
            Err(no_thread(&error))
        }
    }
}

/// `command` for the shell, with the shard's path, quoted, for every `{}`.
#[cfg(unix)]
fn shell(command: &str, path: &Path) -> Command {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;

    let mut quoted = b"'".to_vec();
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    let mut text = OsString::new();
    for (number, part) in command.split("{}").enumerate() {
        if number > 0 {
            text.push(OsStr::from_bytes(&quoted));
        }
        text.push(part);
    }
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(text);
    shell
}

/// `command` for the shell, with the shard's path, quoted, for every `{}`.
#[cfg(not(unix))]
fn shell(command: &str, path: &Path) -> Command {
    let mut shell = Command::new("cmd");
    shell.arg("/C").arg(command.replace("{}", &format!("\"{}\"", path.display())));
    shell
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn paths_reach_the_command_whatever_is_in_them() {
        let path = Path::new("/tmp/it's $HOME \"a\" `b`\n\\");
        let output = shell("printf %s {}; printf %s {}", path).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), path.to_str().unwrap().repeat(2));
    }

    #[test]
    fn of_a_long_complaint_the_last_line_is_kept() {
        let mut child = Command::new("/bin/sh")
            .args([
                "-c",
                "i=0; while [ $i -lt 20000 ]; do echo line $i >&2; i=$((i+1)); done; echo; echo ' the end ' >&2",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(complaint_of(&mut child).unwrap().recv().unwrap(), "the end");
        assert!(child.wait().unwrap().success());
    }
}
